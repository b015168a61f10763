//! A port list in the kernel's format: `8080,15001-15006`.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Sorted ranges of ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ports(Vec<RangeInclusive<u16>>);

impl Ports {
    pub(super) fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }

    pub(super) fn insert(&mut self, port: u16) {
        if !self.contains(port) {
            self.0.push(port..=port);
            self.0.sort_by_key(|range| *range.start());
        }
    }

    pub(super) fn remove(&mut self, port: u16) {
        let without = |range: &RangeInclusive<u16>| {
            if !range.contains(&port) {
                return [Some(range.clone()), None];
            }
            let before = (*range.start() < port).then(|| *range.start()..=port - 1);
            let after = (port < *range.end()).then(|| port + 1..=*range.end());
            [before, after]
        };
        self.0 = self.0.iter().flat_map(without).flatten().collect();
    }
}

impl FromStr for Ports {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ranges = text.trim().split(',').filter(|range| !range.is_empty()).map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Ok(first.trim().parse()?..=last.trim().parse()?)
        });
        Ok(Self(ranges.collect::<Result<_, _>>()?))
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, range) in self.0.iter().enumerate() {
            if place > 0 {
                f.write_str(",")?;
            }
            match (range.start(), range.end()) {
                (first, last) if first == last => write!(f, "{first}")?,
                (first, last) => write!(f, "{first}-{last}")?,
            }
        }
        // An empty write changes nothing.
        if self.0.is_empty() { f.write_str("\n") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(text: &str) -> Ports {
        text.parse().unwrap()
    }

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for text in ["15001", "1-3,5", "8080,15001-15006"] {
            assert_eq!(ports(&format!("{text}\n")).to_string(), text);
        }
        assert_eq!(ports("\n"), Ports::default());
        assert_eq!(Ports::default().to_string(), "\n");
        assert!("1-x".parse::<Ports>().is_err());
    }

    #[test]
    fn ports_are_put_in_and_taken_out() {
        let mut list = ports("1-3,8080");
        for port in [15006, 15001, 2] {
            list.insert(port);
        }
        assert_eq!(list.to_string(), "1-3,8080,15001,15006");
        assert!(list.contains(2) && list.contains(15001) && !list.contains(15002));
        list.remove(2);
        list.remove(8080);
        list.remove(7);
        assert_eq!(list.to_string(), "1,3,15001,15006");
        let mut edges = ports("1-3");
        edges.remove(1);
        edges.remove(3);
        assert_eq!(edges.to_string(), "2");
        let mut last = ports("65535");
        last.remove(65535);
        assert_eq!(last, Ports::default());
    }
}
