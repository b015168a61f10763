//! Client and server over a real socket.

use std::io::{IoSlice, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, sendmsg, socket,
};
use nix::sys::stat::fstat;
use proptest::prelude::*;

use super::client::{self, call, call_done};
use super::testing::{TestAgent, nobody, stale_socket, tracked_fd};
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

fn attachment() -> Attachment {
    Attachment { container_id: "c1".into(), interface: "eth0".into() }
}

fn check() -> Request {
    let addresses: Vec<IpAddr> = vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
    Request::Check { attachment: attachment(), addresses }
}

fn done(_: &Request) -> Vec<Reply> {
    vec![Reply::Done]
}

/// A client that breaks the protocol.
struct Rogue(OwnedFd);

impl Rogue {
    fn connect(path: &Path) -> Self {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        Self(fd)
    }

    fn send(&self, packet: &[u8], fds: &[&OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(packet)], control, MsgFlags::MSG_NOSIGNAL, None)
            .unwrap();
    }

    /// The next reply, or `None` at the end of the connection.
    fn receive(&self) -> Option<Reply> {
        let mut buffer = vec![0; MAX_PACKET];
        let mut data = [IoSliceMut::new(&mut buffer)];
        let size = recvmsg::<()>(self.0.as_raw_fd(), &mut data, None, MsgFlags::empty()).unwrap().bytes;
        (size > 0).then(|| packet::decode(&buffer[..size]).unwrap())
    }

    fn error_kind(&self) -> ErrorKind {
        match self.receive() {
            Some(Reply::Error(error)) => error.kind,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn requests_and_replies_cross_and_the_namespace_with_them() {
    let agent = TestAgent::start(done);
    let (fd, tracker) = tracked_fd();
    let inode = fstat(&fd).unwrap().st_ino;

    call_done(&agent.socket(), &check(), Some(fd.as_fd()), PATIENCE).unwrap();
    call_done(&agent.socket(), &Request::Ready, None, PATIENCE).unwrap();

    assert_eq!(agent.requests(), [(check(), Some(inode)), (Request::Ready, None)]);
    drop(fd);
    tracker.assert_closed();
}

#[test]
fn several_packets_are_one_answer() {
    let reply = |more| Reply::Pods { pods: Vec::new(), more };
    let agent = TestAgent::start(move |_| vec![reply(true), reply(true), reply(false), Reply::Done]);
    let replies = call(&agent.socket(), &Request::Pods, None, PATIENCE).unwrap();
    assert_eq!(replies, [reply(true), reply(true), reply(false)], "nothing follows the final reply");
}

#[test]
fn incomplete_and_oversized_answers_become_errors() {
    let oversized = Reply::Added { enrolled: true };
    for replies in [
        vec![],
        vec![Reply::Pods { pods: Vec::new(), more: true }],
        vec![Reply::Error(Error::new(ErrorKind::Internal, "x".repeat(MAX_PACKET))), oversized],
    ] {
        let agent = TestAgent::start(move |_| replies.clone());
        let error = call(&agent.socket(), &Request::Pods, None, PATIENCE).unwrap_err();
        let client::Error::Refused(error) = error else { panic!("{error:?}") };
        assert_eq!(error.kind, ErrorKind::Internal);
    }
}

#[test]
fn a_dead_agent_is_named_with_the_remedy() {
    let (_guard, path) = nobody();
    for stale in [false, true] {
        if stale {
            stale_socket(&path);
        }
        let error = call(&path, &Request::Ready, None, PATIENCE).unwrap_err();
        assert!(matches!(error, client::Error::Unreachable { .. }), "{error:?}");
        assert!(error.is_unanswered());
        let message = error.to_string();
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        assert!(message.contains("is the ambient-redirect DaemonSet running on this node?"), "{message}");
    }
}

#[test]
fn the_deadline_holds_against_a_slow_agent() {
    let agent = TestAgent::start_slow(Duration::from_secs(2), done);
    let start = Instant::now();
    let error = call(&agent.socket(), &Request::Ready, None, Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, client::Error::TimedOut { .. }), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn the_deadline_holds_against_an_agent_that_never_accepts() {
    let (_guard, path) = nobody();
    let _listening = redirect_linux::socket_file::listen_at(&path).unwrap();
    let error = call(&path, &Request::Ready, None, Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, client::Error::TimedOut { .. }), "{error:?}");
}

#[test]
fn the_client_knows_an_agent_of_another_version() {
    let (_guard, path) = nobody();
    let (listener, _file) = redirect_linux::socket_file::listen_at(&path).unwrap();
    let other = std::thread::spawn(move || {
        loop {
            match nix::sys::socket::accept(listener.as_raw_fd()) {
                Ok(fd) => {
                    let packet = br#"{"version":2,"body":{"reply":"from the future"}}"#;
                    sendmsg::<()>(fd, &[IoSlice::new(packet)], &[], MsgFlags::empty(), None).unwrap();
                    return fd;
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    });
    let error = call(&path, &Request::Ready, None, PATIENCE).unwrap_err();
    assert!(matches!(error, client::Error::Version { theirs: 2, .. }), "{error:?}");
    nix::unistd::close(other.join().unwrap()).unwrap();
}

#[test]
fn the_agent_refuses_other_versions_nonsense_and_oversized_packets() {
    let agent = TestAgent::start(done);
    let oversized = vec![b' '; MAX_PACKET + 1];
    let cases: [(&[u8], ErrorKind); 4] = [
        (br#"{"version":2,"body":{}}"#, ErrorKind::Version),
        (b"nonsense", ErrorKind::Malformed),
        (br#"{"version":1,"body":{"request":"explode"}}"#, ErrorKind::Malformed),
        (&oversized, ErrorKind::Malformed),
    ];
    for (packet, kind) in cases {
        let (fd, tracker) = tracked_fd();
        let rogue = Rogue::connect(&agent.socket());
        rogue.send(packet, &[&fd]);
        assert_eq!(rogue.error_kind(), kind);
        drop(fd);
        tracker.assert_closed();
    }
    assert_eq!(agent.requests(), []);
}

#[test]
fn the_agent_refuses_a_wrong_number_of_descriptors_and_keeps_none() {
    let agent = TestAgent::start(done);
    for (request, count) in
        [(check(), 0), (check(), 2), (check(), 40), (Request::Ready, 1), (Request::Pods, 3)]
    {
        let (fd, tracker) = tracked_fd();
        let rogue = Rogue::connect(&agent.socket());
        rogue.send(&packet::encode(&request).unwrap(), &vec![&fd; count]);
        assert_eq!(rogue.error_kind(), ErrorKind::Malformed, "{request:?} with {count}");
        drop(fd);
        tracker.assert_closed();
    }
    assert_eq!(agent.requests(), []);
}

#[test]
fn bad_clients_disturb_nobody() {
    let agent = TestAgent::start(done);
    let silent: Vec<_> = (0..50).map(|_| Rogue::connect(&agent.socket())).collect();
    drop(Rogue::connect(&agent.socket()));
    let gone = Rogue::connect(&agent.socket());
    gone.send(&packet::encode(&Request::Ready).unwrap(), &[]);
    drop(gone);
    let start = Instant::now();
    call_done(&agent.socket(), &Request::Ready, None, PATIENCE).unwrap();
    assert!(start.elapsed() < Duration::from_secs(3), "served while others are silent");
    assert_eq!(silent[0].error_kind(), ErrorKind::Malformed, "the read deadline ends a silent client");
}

#[test]
fn a_shutdown_lets_requests_finish_and_removes_the_socket() {
    let mut agent = TestAgent::start_slow(Duration::from_millis(300), done);
    let path = agent.socket();
    let rogue = Rogue::connect(&path);
    rogue.send(&packet::encode(&Request::Ready).unwrap(), &[]);
    while agent.requests().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    agent.stop();
    assert_eq!(rogue.receive(), Some(Reply::Done));
    assert!(!path.exists());
}

#[test]
fn arbitrary_packets_are_answered_and_the_agent_lives() {
    let agent = TestAgent::start(done);
    let packet = prop::collection::vec(any::<u8>(), 1..200);
    proptest!(ProptestConfig::with_cases(64), |(packet in packet)| {
        let rogue = Rogue::connect(&agent.socket());
        rogue.send(&packet, &[]);
        prop_assert_eq!(rogue.error_kind(), ErrorKind::Malformed);
    });
    call_done(&agent.socket(), &Request::Ready, None, PATIENCE).unwrap();
}
