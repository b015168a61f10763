//! Unparsed messages. The kernel sends many attributes for each object, most of which the agent doesn't need: decoding them all
//! would take longer than the kernel takes to write them. For nftables there are no typed messages at all.

use rtnetlink::packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlaBuffer, NlasIterator,
};

/// A message: a structure whose size depends on the kind, then attributes.
#[derive(Debug, PartialEq, Eq)]
pub struct Raw {
    kind: u16,
    content: Vec<u8>,
}

impl NetlinkDeserializable for Raw {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self::new(header.message_type, payload.into()))
    }
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.content.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.content);
    }
}

impl Raw {
    /// A message of this kind.
    #[must_use]
    pub const fn new(kind: u16, content: Vec<u8>) -> Self {
        Self { kind, content }
    }

    /// `RTM_…`, or its equivalent in other protocols.
    #[must_use]
    pub const fn kind(&self) -> u16 {
        self.kind
    }

    /// A byte of the structure; zero beyond the end.
    #[must_use]
    pub fn byte(&self, at: usize) -> u8 {
        self.content.get(at).copied().unwrap_or_default()
    }

    /// 32 bits of the structure; zero beyond the end.
    #[must_use]
    pub fn word(&self, at: usize) -> u32 {
        self.content.get(at..).and_then(word).unwrap_or_default()
    }

    /// The attributes that follow a structure of this size.
    pub(super) fn attributes(&self, size: usize) -> impl Iterator<Item = Attribute<'_>> {
        attributes(self.content.get(size..).unwrap_or_default())
    }
}

/// An attribute of a received message.
pub(super) type Attribute<'a> = NlaBuffer<&'a [u8]>;

/// The attributes that can be parsed.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    NlasIterator::new(bytes).map_while(Result::ok)
}

/// The first 32 bits.
pub(super) fn word(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A string, which ends at its first zero byte.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        attributes(bytes).map(|attribute| (attribute.kind(), attribute.value().to_vec())).collect()
    }

    #[test]
    fn attributes_are_read_as_far_as_they_go() {
        let whole = [5u16.to_ne_bytes(), 1u16.to_ne_bytes(), [7, 0], [0, 0]].concat();
        let nested = [8u16.to_ne_bytes(), (0x8000u16 | 2).to_ne_bytes(), [1, 0], [0, 0]].concat();
        let both = [whole.clone(), nested].concat();
        assert_eq!(read(&both), [(1, vec![7]), (2, 1u32.to_ne_bytes().to_vec())]);
        // Truncated, shorter than a header, empty.
        assert_eq!(read(&both[..14]).len(), 1);
        assert_eq!(read(&[3, 0, 1, 0, 0, 0, 0, 0]).len(), 0);
        assert_eq!(read(&[]).len(), 0);
        let raw = Raw { kind: 16, content: [vec![9, 0, 0, 0], whole].concat() };
        assert_eq!((raw.byte(0), raw.word(0), raw.byte(99), raw.word(99)), (9, 9, 0, 0));
        assert_eq!(raw.attributes(4).count(), 1);
        assert_eq!(raw.attributes(99).count(), 0);
    }

    #[test]
    fn texts_end_with_a_zero_or_with_the_attribute() {
        assert_eq!(text(b"eth0\0"), "eth0");
        assert_eq!(text(b"eth0"), "eth0");
        assert_eq!(text(b""), "");
    }
}
