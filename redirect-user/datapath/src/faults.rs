//! Converts the drop log's numbers into text.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use log::{Log, Metadata, Record};
use redirect_ebpf::Family;
use redirect_ebpf::diagnostics::{Fault, Hook, NUMBERS, TARGET};

/// Formats records, and counts them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Words {
    read: Arc<AtomicU32>,
}

impl Words {
    /// A formatter, and its number of records.
    pub(crate) fn counted() -> (Self, Arc<AtomicU32>) {
        let read = Arc::<AtomicU32>::default();
        (Self { read: Arc::clone(&read) }, read)
    }
}

impl Log for Words {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        self.read.fetch_add(1, Ordering::Relaxed);
        let text = record.args().to_string();
        let Some(told) = Told::parse(&text) else {
            tracing::debug!(target: TARGET, "{text}");
            return;
        };
        let Told { fault, hook, family, error, netns_cookie, interface, length } = told;
        let error = error.map(|error| error.to_string());
        tracing::debug!(
            target: TARGET,
            hook = hook.label(),
            family = family.name(),
            error,
            netns_cookie,
            interface,
            length,
            "{}",
            fault.label()
        );
    }

    fn flush(&self) {}
}

/// The numbers of one record. Zero means unknown.
#[derive(Debug)]
struct Told {
    fault: Fault,
    hook: Hook,
    family: Family,
    error: Option<io::Error>,
    netns_cookie: Option<u64>,
    interface: Option<u64>,
    length: Option<u64>,
}

impl Told {
    fn parse(text: &str) -> Option<Self> {
        let numbers: Vec<i64> = text.split(' ').map(str::parse).collect::<Result<_, _>>().ok()?;
        let [fault, hook, family, error, rest @ ..] = <[i64; NUMBERS]>::try_from(numbers).ok()?;
        let [netns_cookie, interface, length] =
            rest.map(|number| (number != 0).then(|| number.cast_unsigned()));
        let error = i32::try_from(error).ok()?;
        Some(Self {
            fault: *Fault::ALL.get(usize::try_from(fault).ok()?)?,
            hook: *Hook::ALL.get(usize::try_from(hook).ok()?)?,
            family: *Family::ALL.get(usize::try_from(family).ok()?)?,
            error: (error != 0).then(|| io::Error::from_raw_os_error(-error)),
            netns_cookie,
            interface,
            length,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_words() {
        let text =
            format!("{} {} {} -14 0 3 66", Fault::Malformed as u8, Hook::Inbound as u8, Family::Ipv6 as u8);
        let told = Told::parse(&text).unwrap();
        assert_eq!((told.fault, told.hook, told.family), (Fault::Malformed, Hook::Inbound, Family::Ipv6));
        assert_eq!(told.error.and_then(|error| error.raw_os_error()), Some(libc::EFAULT));
        assert_eq!((told.netns_cookie, told.interface, told.length), (None, Some(3), Some(66)));
        for other in ["", "a text", "0 0 0", "99 0 0 0 0 0 0", "0 0 2 0 0 0 0", "0 0 0 0 0 0 0 0"] {
            assert!(Told::parse(other).is_none(), "{other}");
        }
    }
}
