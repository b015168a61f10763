//! Raw answers of the kernel. It sends many attributes of each object, most of which the agent doesn't need: decoding all of them
//! would take longer than the kernel needs to write them.

use rtnetlink::packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader};

/// An answer: a structure whose size depends on the kind, then attributes.
#[derive(Debug)]
pub(crate) struct Raw {
    /// `RTM_…`
    pub(crate) kind: u16,
    content: Vec<u8>,
}

impl NetlinkDeserializable for Raw {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self { kind: header.message_type, content: payload.into() })
    }
}

impl Raw {
    /// A byte of the structure; zero beyond the end.
    pub(crate) fn byte(&self, at: usize) -> u8 {
        self.content.get(at).copied().unwrap_or_default()
    }

    /// 32 bits of the structure.
    pub(crate) fn word(&self, at: usize) -> u32 {
        self.content.get(at..).and_then(word).unwrap_or_default()
    }

    /// The attributes that follow a structure of this size.
    pub(crate) fn attributes(&self, size: usize) -> impl Iterator<Item = (u16, &[u8])> {
        attributes(self.content.get(size..).unwrap_or_default())
    }
}

/// The numbers of attributes and what they hold, as far as that can be read.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// Without the flags (nested, in network byte order).
    const NUMBER: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let [length, length_high, kind, kind_high, ..] = *rest else { return None };
        let length = usize::from(u16::from_ne_bytes([length, length_high]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([kind, kind_high]) & NUMBER, value))
    })
}

/// The first 32 bits.
pub(crate) fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A text, which ends with a zero.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_far_as_they_go() {
        let whole = [5u16.to_ne_bytes(), 1u16.to_ne_bytes(), [7, 0], [0, 0]].concat();
        let nested = [8u16.to_ne_bytes(), (0x8000u16 | 2).to_ne_bytes(), [1, 0], [0, 0]].concat();
        let both = [whole.clone(), nested].concat();
        let found: Vec<_> = attributes(&both).collect();
        assert_eq!(found, [(1, &[7][..]), (2, &1u32.to_ne_bytes()[..])]);
        // Cut short, too short to be one, nothing.
        assert_eq!(attributes(&both[..14]).count(), 1);
        assert_eq!(attributes(&[3, 0, 1, 0, 0, 0, 0, 0]).count(), 0);
        assert_eq!(attributes(&[]).count(), 0);
        let raw = Raw { kind: 16, content: [vec![9, 0, 0, 0], whole].concat() };
        assert_eq!((raw.byte(0), raw.word(0), raw.byte(99), raw.word(99)), (9, 9, 0, 0));
        assert_eq!(raw.attributes(4).collect::<Vec<_>>(), [(1, &[7][..])]);
        assert_eq!(raw.attributes(99).count(), 0);
    }

    #[test]
    fn texts_end_with_a_zero_or_with_the_attribute() {
        assert_eq!(text(b"eth0\0"), "eth0");
        assert_eq!(text(b"eth0"), "eth0");
        assert_eq!(text(b""), "");
    }
}
