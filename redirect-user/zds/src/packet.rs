//! Encodes and decodes packets, for both sides.
//!
//! A packet is one protobuf message of at most [`MAX_PACKET`] bytes, so messages never have to be reassembled. An
//! empty packet looks like the end of the connection; no message of the protocol is empty, and none is ever encoded
//! as such.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use prost::Message;
use tokio_seqpacket::UnixSeqpacket;
use tokio_seqpacket::ancillary::{AncillaryMessageWriter, OwnedAncillaryMessage};

use super::MAX_PACKET;

/// Room for a few descriptors. A packet carries at most one, but surplus ones have to be received to be closed and
/// reported; the kernel closes those that do not fit.
const ANCILLARY_BYTES: usize = 64;

/// Why a packet can't be created, sent, received or parsed.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The message does not fit.
    #[error("the message has {0} bytes, the limit is {MAX_PACKET}: shorten the pod's names")]
    TooLarge(usize),
    /// The message is empty: the other side would take it for the end of the connection.
    #[error("the message is empty")]
    Empty,
    /// The packet exceeds the maximum size.
    #[error("the packet is larger than {MAX_PACKET} bytes: the other side does not speak ZDS")]
    Truncated,
    /// Descriptors where none are allowed, or too many.
    #[error("the packet carries unexpected file descriptors")]
    UnexpectedDescriptors,
    /// It is not a protobuf message of the expected type.
    #[error("the packet cannot be decoded, the other side does not speak ZDS: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
}

/// A received message with its descriptors.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// The descriptors, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
}

/// Encodes a message.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, PacketError> {
    match message.encoded_len() {
        0 => Err(PacketError::Empty),
        length if length > MAX_PACKET => Err(PacketError::TooLarge(length)),
        _ => Ok(message.encode_to_vec()),
    }
}

/// Decodes a message.
pub fn decode<M: Message + Default>(packet: &[u8]) -> Result<M, PacketError> {
    match packet.len() {
        0 => Err(PacketError::Empty),
        length if length > MAX_PACKET => Err(PacketError::Truncated),
        _ => Ok(M::decode(packet)?),
    }
}

/// Sends one message, with a descriptor if there is one.
pub async fn send(
    socket: &UnixSeqpacket,
    message: &impl Message,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), PacketError> {
    let packet = encode(message)?;
    let mut buffer = [0; ANCILLARY_BYTES];
    let mut ancillary = AncillaryMessageWriter::new(&mut buffer);
    if let Some(descriptor) = descriptor {
        ancillary.add_fds([descriptor]).map_err(|_| PacketError::UnexpectedDescriptors)?;
    }
    // A seqpacket socket sends a packet as a whole or not at all.
    socket.send_with_ancillary(&packet, &mut ancillary).await?;
    Ok(())
}

/// Receives one message; `None` at the end of the connection. Cancel-safe: a packet is either still queued or
/// returned.
pub async fn receive<M: Message + Default>(
    socket: &UnixSeqpacket,
) -> Result<Option<Received<M>>, PacketError> {
    let mut packet = [0; MAX_PACKET];
    let mut buffer = [0; ANCILLARY_BYTES];
    let (info, ancillary) = socket.recv_with_ancillary(&mut packet, &mut buffer).await?;
    // Takes ownership of the descriptors first, so that none leaks if the packet is bad.
    let descriptors: Vec<OwnedFd> = ancillary
        .into_messages()
        .filter_map(|message| match message {
            OwnedAncillaryMessage::FileDescriptors(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if info.truncated() {
        return Err(PacketError::Truncated);
    }
    if info.ancillary_truncated() {
        return Err(PacketError::UnexpectedDescriptors);
    }
    let bytes = packet.get(..info.bytes_read()).unwrap_or_default();
    if bytes.is_empty() {
        return Ok(None);
    }
    Ok(Some(Received { message: decode(bytes)?, descriptors }))
}

/// Like [`receive`], for the direction without descriptors.
pub async fn receive_plain<M: Message + Default>(socket: &UnixSeqpacket) -> Result<Option<M>, PacketError> {
    match receive(socket).await? {
        None => Ok(None),
        Some(Received { message, descriptors }) if descriptors.is_empty() => Ok(Some(message)),
        Some(_) => Err(PacketError::UnexpectedDescriptors),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;
    use crate::messages::{
        Ack, AddWorkload, DelWorkload, Hello, KeepWorkload, Request, Response, SnapshotSent, Version,
        WorkloadInfo, WorkloadRequest, WorkloadResponse,
    };

    fn request() -> impl Strategy<Value = WorkloadRequest> {
        let info = (".{0,40}", ".{0,40}", ".{0,40}")
            .prop_map(|(name, namespace, service_account)| WorkloadInfo { name, namespace, service_account });
        prop_oneof![
            (".{0,40}", proptest::option::of(info))
                .prop_map(|(uid, workload_info)| Request::Add(AddWorkload { uid, workload_info })),
            ".{0,40}".prop_map(|uid| Request::Del(DelWorkload { uid })),
            ".{0,40}".prop_map(|uid| Request::Keep(KeepWorkload { uid })),
            Just(Request::SnapshotSent(SnapshotSent {})),
        ]
        .prop_map(|payload| WorkloadRequest { payload: Some(payload) })
    }

    proptest! {
        #[test]
        fn requests_survive_the_round_trip(request in request()) {
            let packet = encode(&request).unwrap();
            prop_assert!(packet.len() <= MAX_PACKET);
            prop_assert_eq!(decode::<WorkloadRequest>(&packet).unwrap(), request);
        }

        #[test]
        fn responses_survive_the_round_trip(error in ".{0,200}") {
            let response = WorkloadResponse { payload: Some(Response::Ack(Ack { error })) };
            prop_assert_eq!(decode::<WorkloadResponse>(&encode(&response).unwrap()).unwrap(), response);
        }

        #[test]
        fn no_packet_makes_the_decoder_panic(packet in proptest::collection::vec(any::<u8>(), 0..1200)) {
            let _ = decode::<WorkloadRequest>(&packet);
            let _ = decode::<WorkloadResponse>(&packet);
            let _ = decode::<Hello>(&packet);
        }
    }

    #[test]
    fn packets_look_as_ztunnel_expects_them() {
        assert_eq!(encode(&Hello { version: Version::V1.into() }).unwrap(), [0x08, 1]);
        let del = Request::Del(DelWorkload { uid: "a".into() });
        assert_eq!(encode(&WorkloadRequest { payload: Some(del) }).unwrap(), [0x12, 3, 0x12, 1, b'a']);
        let snapshot = Request::SnapshotSent(SnapshotSent {});
        assert_eq!(encode(&WorkloadRequest { payload: Some(snapshot) }).unwrap(), [0x1a, 0]);
        let keep = Request::Keep(KeepWorkload { uid: "a".into() });
        assert_eq!(encode(&WorkloadRequest { payload: Some(keep) }).unwrap(), [0x2a, 3, 0x0a, 1, b'a']);
        let ack = Response::Ack(Ack { error: String::new() });
        assert_eq!(encode(&WorkloadResponse { payload: Some(ack) }).unwrap(), [0x0a, 0]);
    }

    #[test]
    fn the_size_is_bounded_both_ways() {
        let del = Request::Del(DelWorkload { uid: "a".repeat(MAX_PACKET) });
        let request = WorkloadRequest { payload: Some(del) };
        assert!(matches!(encode(&request), Err(PacketError::TooLarge(_))));
        assert!(matches!(decode::<WorkloadRequest>(&[0; MAX_PACKET + 1]), Err(PacketError::Truncated)));
        assert!(matches!(encode(&WorkloadResponse { payload: None }), Err(PacketError::Empty)));
        assert!(matches!(decode::<WorkloadResponse>(&[]), Err(PacketError::Empty)));
    }

    #[tokio::test]
    async fn a_descriptor_travels_with_its_message() {
        let (left, right) = UnixSeqpacket::pair().unwrap();
        let hello = Hello { version: Version::V1.into() };
        let file = tempfile::tempfile().unwrap();
        send(&left, &hello, Some(file.as_fd())).await.unwrap();
        send(&left, &hello, None).await.unwrap();
        drop(left);

        let received = receive::<Hello>(&right).await.unwrap().unwrap();
        assert_eq!(received.message, hello);
        let [descriptor] = received.descriptors.as_slice() else { panic!("one descriptor was sent") };
        let (sent, got) = (nix::sys::stat::fstat(&file).unwrap(), nix::sys::stat::fstat(descriptor).unwrap());
        assert_eq!((sent.st_dev, sent.st_ino), (got.st_dev, got.st_ino));

        assert!(receive::<Hello>(&right).await.unwrap().unwrap().descriptors.is_empty());
        assert!(receive::<Hello>(&right).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_descriptor_is_refused_where_none_belongs() {
        let (left, right) = UnixSeqpacket::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&left, &Hello { version: 1 }, Some(file.as_fd())).await.unwrap();
        assert!(matches!(receive_plain::<Hello>(&right).await, Err(PacketError::UnexpectedDescriptors)));
    }

    #[tokio::test]
    async fn an_oversized_packet_is_refused() {
        let (left, right) = UnixSeqpacket::pair().unwrap();
        left.send(&[0; MAX_PACKET + 1]).await.unwrap();
        assert!(matches!(receive::<Hello>(&right).await, Err(PacketError::Truncated)));
    }
}
