//! One packet: JSON inside an [`Envelope`], never larger than [`MAX_PACKET`].

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Envelope, MAX_PACKET, VERSION};

/// Why a packet can't be created or parsed.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// It exceeds the maximum size.
    #[error("the packet has {size} bytes, the limit is {MAX_PACKET}")]
    TooLarge {
        /// Its size.
        size: usize,
    },
    /// The sender speaks another version.
    #[error("protocol version {theirs} instead of {VERSION}")]
    Version {
        /// The sender's version.
        theirs: u16,
    },
    /// It is not valid JSON, or not a message.
    #[error("the packet is not the expected JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// The part of an envelope that every version of the protocol shares.
#[derive(Deserialize)]
struct Header {
    version: u16,
}

/// Space for the elements of a list in one packet. The rest is for the envelope around them, such as
/// `{"version":…,"body":{"reply":"pods","pods":[…],"more":false}}`.
pub(super) const ROOM: usize = MAX_PACKET - 128;

/// The size of a list element as JSON, with a comma.
pub(super) fn size(element: &impl Serialize) -> usize {
    serde_json::to_vec(element).map_or(0, |json| json.len() + 1)
}

/// Splits a list of elements with their sizes into parts that fit in one packet each. Returns at least one
/// part.
pub(super) fn split<T>(elements: impl IntoIterator<Item = (T, usize)>) -> Vec<Vec<T>> {
    let mut parts = vec![Vec::new()];
    let mut room = ROOM;
    for (element, size) in elements {
        if size > room {
            parts.push(Vec::new());
            room = ROOM;
        }
        room = room.saturating_sub(size);
        if let Some(part) = parts.last_mut() {
            part.push(element);
        }
    }
    parts
}

/// Encodes a message.
pub fn encode<T: Serialize>(body: &T) -> Result<Vec<u8>, PacketError> {
    let packet = serde_json::to_vec(&Envelope { version: VERSION, body })?;
    if packet.len() > MAX_PACKET { Err(PacketError::TooLarge { size: packet.len() }) } else { Ok(packet) }
}

/// Decodes a message. Checks the version first, because the body of another version may have any form.
pub fn decode<T: DeserializeOwned>(packet: &[u8]) -> Result<T, PacketError> {
    let Header { version } = serde_json::from_slice(packet)?;
    if version != VERSION {
        return Err(PacketError::Version { theirs: version });
    }
    Ok(serde_json::from_slice::<Envelope<T>>(packet)?.body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Reply, Request};
    use super::*;

    #[test]
    fn a_packet_survives_the_journey() {
        let request = Request::Gc { valid: Vec::new() };
        assert_eq!(decode::<Request>(&encode(&request).unwrap()).unwrap(), request);
    }

    #[test]
    fn another_version_is_told_apart_from_nonsense() {
        let packet = br#"{"version":7,"body":{"request":"not of this version"}}"#;
        assert!(matches!(decode::<Request>(packet), Err(PacketError::Version { theirs: 7 })));
        let packet = br#"{"version":1,"body":{"request":"not of this version"}}"#;
        assert!(matches!(decode::<Request>(packet), Err(PacketError::Json(_))));
    }

    #[test]
    fn a_large_packet_is_not_sent() {
        let request = Request::Del {
            attachment: super::super::Attachment {
                container_id: "x".repeat(MAX_PACKET),
                interface: "eth0".into(),
            },
        };
        assert!(matches!(encode(&request), Err(PacketError::TooLarge { size }) if size > MAX_PACKET));
    }

    proptest! {
        #[test]
        fn arbitrary_packets_do_no_harm(packet in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<Request>(&packet);
            let _ = decode::<Reply>(&packet);
        }

        #[test]
        fn almost_right_packets_do_no_harm(kind in "[a-z]{0,6}|add|gc|pods|del", rest in "[\"{}\\[\\]:,a-z0-9]{0,40}") {
            let packet = format!(r#"{{"version":1,"body":{{"request":"{kind}",{rest}}}}}"#);
            let _ = decode::<Request>(packet.as_bytes());
        }
    }
}
