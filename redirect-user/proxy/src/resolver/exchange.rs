//! One query to one upstream server, from the pod's namespace.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::super::Transport;
use super::super::context::Context;
use super::super::sockets;
use super::message::{Answer, Question};

/// The deadline for a server's answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Queries over UDP, and again over TCP if the answer is truncated and the client, which uses TCP, needs all
/// of it.
pub(super) async fn ask(
    context: &Context,
    server: SocketAddr,
    question: &Question,
    transport: Transport,
) -> io::Result<Answer> {
    let answer = timeout(PATIENCE, by_udp(context, server, question)).await??;
    if transport == Transport::Tcp && answer.truncated {
        return timeout(PATIENCE, by_tcp(context, server, question)).await?;
    }
    Ok(answer)
}

/// Each query has a socket of its own: the port that the kernel chooses makes answers hard to forge.
async fn by_udp(context: &Context, server: SocketAddr, question: &Question) -> io::Result<Answer> {
    let namespaces = &context.shared.namespaces;
    let socket = namespaces.socket(&context.netns, Domain::for_address(server), Type::DGRAM).await?;
    sockets::mark_as_own(&socket)?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(server).await?;
    socket.send(question.bytes()).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let bytes = buffer.get(..length).unwrap_or_default().to_vec();
        // Another datagram may come first, such as an answer to a previous owner of the port.
        if let Some(answer) = question.answered_by(bytes) {
            return Ok(answer);
        }
    }
}

async fn by_tcp(context: &Context, server: SocketAddr, question: &Question) -> io::Result<Answer> {
    let namespaces = &context.shared.namespaces;
    let socket = namespaces.socket(&context.netns, Domain::for_address(server), Type::STREAM).await?;
    sockets::mark_as_own(&socket)?;
    let mut stream = TcpSocket::from_std_stream(socket.into()).connect(server).await?;
    write_framed(&mut stream, question.bytes()).await?;
    let bytes = read_framed(&mut stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    question.answered_by(bytes).ok_or_else(|| io::Error::other("the answer is to another question"))
}

/// Reads a message with its length prefix; `None` at the end of the connection.
pub(super) async fn read_framed(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; length.into()];
    stream.read_exact(&mut bytes).await?;
    Ok(Some(bytes))
}

/// Sends a message with its length prefix in one piece: some peers expect to read both at once.
pub(super) async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}
