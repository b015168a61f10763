//! Applications for pods, as processes: a server that greets and echoes, and a client that prints what it
//! received.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use socket2::Socket;

use crate::echo::Hello;
use crate::stack::canonical;
use crate::{Connection, Stack, connection, echo, server};

/// What to be.
#[derive(Debug, Subcommand)]
pub enum Application {
    /// Greets every client with one line of JSON, then echoes.
    TcpEcho {
        /// Where to listen; repeat it for several. `[::]` takes IPv6 alone.
        #[arg(long, required = true)]
        listen: Vec<SocketAddr>,
        /// What the greeting says.
        #[arg(long)]
        greeting: String,
        /// Listens as a node proxy does: with this mark, transparent, sharing its ports.
        #[arg(long)]
        proxy_mark: Option<u32>,
    },
    /// Connects and prints one line of JSON for each connection.
    Client {
        /// The kind of socket.
        #[arg(long)]
        family: SocketKind,
        /// The server; repeat it for several.
        #[arg(long, required = true)]
        to: Vec<SocketAddr>,
        /// How many connections to each, one after the other.
        #[arg(long, default_value_t = 1)]
        count: usize,
        /// How long to pause after each connection, in milliseconds.
        #[arg(long, default_value_t = 0)]
        pause: u64,
        /// The socket's mark (`SO_MARK`).
        #[arg(long)]
        mark: Option<u32>,
        /// How long to wait, in seconds.
        #[arg(long, default_value_t = 5)]
        limit: u64,
    },
}

/// The kind of a client's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketKind {
    /// AF_INET.
    V4,
    /// AF_INET6.
    V6,
    /// AF_INET6 with v4-mapped addresses.
    Mapped,
}

impl SocketKind {
    /// As the command line spells it.
    #[must_use]
    pub fn of(stack: Stack) -> &'static str {
        match stack {
            Stack::V4 => "v4",
            Stack::V6 => "v6",
            Stack::Mapped => "mapped",
        }
    }
}

impl From<SocketKind> for Stack {
    fn from(kind: SocketKind) -> Self {
        match kind {
            SocketKind::V4 => Self::V4,
            SocketKind::V6 => Self::V6,
            SocketKind::Mapped => Self::Mapped,
        }
    }
}

/// Runs an application to its end.
pub fn run(application: Application) -> Result<()> {
    match application {
        Application::TcpEcho { listen, greeting, proxy_mark } => serve(&listen, &greeting, proxy_mark),
        Application::Client { family, to, count, pause, mark, limit } => {
            for &to in std::iter::repeat_n(&to, count).flatten() {
                let start = Instant::now();
                let answer = ask(family.into(), to, mark, Duration::from_secs(limit));
                let answer = Answer { microseconds: start.elapsed().as_micros() as u64, ..answer };
                println!("{}", serde_json::to_string(&answer)?);
                thread::sleep(Duration::from_millis(pause));
            }
            Ok(())
        }
    }
}

fn serve(addresses: &[SocketAddr], greeting: &str, proxy_mark: Option<u32>) -> Result<()> {
    let prepare = |socket: &Socket| match proxy_mark {
        Some(mark) => {
            socket.set_mark(mark)?;
            socket.set_reuse_port(true)?;
            // The kernel checks this option in both families.
            socket.set_ip_transparent_v4(true)
        }
        None => Ok(()),
    };
    let mut listeners = Vec::new();
    for &address in addresses {
        let stack = if address.is_ipv4() { Stack::V4 } else { Stack::V6 };
        let listener = server::listen_prepared(stack, address, prepare);
        listeners.push(listener.with_context(|| format!("listen on {address}"))?);
    }
    println!("listening");
    thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(move || {
                for stream in listener.incoming().flatten() {
                    let greeting = greeting.to_owned();
                    thread::spawn(move || {
                        let hello = echo::hello(&stream, &greeting)?;
                        echo::serve(&stream, &hello)
                    });
                }
            });
        }
    });
    Ok(())
}

/// What a client prints about a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What the server said first.
    pub heard: Option<Hello>,
    /// The server, as the client's socket has it.
    pub getpeername: Option<SocketAddr>,
    /// The client, likewise.
    pub getsockname: Option<SocketAddr>,
    /// Why there is no answer.
    pub error: Option<String>,
    /// How long it took.
    pub microseconds: u64,
}

impl Answer {
    /// Whether the client itself came to the server, without a proxy in between.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        let peer = self.heard.as_ref().map(|heard| heard.peer);
        peer.is_some() && peer == self.getsockname.map(canonical)
    }
}

fn ask(stack: Stack, to: SocketAddr, mark: Option<u32>, limit: Duration) -> Answer {
    let prepare = |socket: &socket2::Socket| mark.map_or(Ok(()), |mark| socket.set_mark(mark));
    let stream = connection::dial_prepared(stack, to, limit, prepare);
    match stream.map_err(Into::into).and_then(Connection::greeted) {
        Ok(connection) => Answer {
            heard: Some(connection.heard),
            getpeername: Some(connection.peer_name),
            getsockname: Some(connection.local_name),
            ..Answer::default()
        },
        Err(error) => Answer { error: Some(format!("{error:#}")), ..Answer::default() },
    }
}
