//! The load generators of the arms: identical processes in different places.

use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;

use super::load::{Block, Latency, Order, Outcome};
use super::place::{APPLICATIONS, Place};
use super::protocol::Sight;
use super::world::{Arm, World, own_program};
use crate::netns::Netns;
use crate::{Stack, signals};

/// A load generator, which ends with this value.
#[derive(Debug)]
pub struct Client {
    name: String,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    process: Child,
}

impl Client {
    /// Starts it in a namespace, as an application of an arm.
    pub fn start(world: &World, arm: Arm, netns: &Netns) -> Result<Self> {
        let name = format!("load generator of {}", arm.label());
        let mut command = own_program()?;
        command.arg("load").args(Place::arguments(APPLICATIONS, Some(world.applications(arm)?)));
        let mut process = spawn(command, netns).with_context(|| name.clone())?;
        let (orders, answers) = (process.stdin.take(), process.stdout.take().context("standard output")?);
        Ok(Self { name, orders, answers: BufReader::new(answers), process })
    }

    /// Measures for a moment.
    pub fn measure(&mut self, block: &Block) -> Result<Outcome> {
        let outcome: Outcome = self.ask(&Order::Block(block.clone()))?;
        ensure!(outcome.count > 0, "{}: nothing came of it, with {} errors", self.name, outcome.errors);
        Ok(outcome)
    }

    /// Asks a server how it sees the connection.
    pub fn identify(&mut self, stack: Stack, to: SocketAddr) -> Result<Sight> {
        self.ask(&Order::Identify(stack, to))
    }

    /// Closes its connections. Returns the latencies since the last time.
    pub fn finish(&mut self) -> Result<Latency> {
        self.ask(&Order::Finish)
    }

    fn ask<T: DeserializeOwned>(&mut self, order: &Order) -> Result<T> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        let mut answer = String::new();
        let asked = self.orders.as_mut().context("it was ended")?.write_all(&line);
        asked.and_then(|()| self.answers.read_line(&mut answer)).with_context(|| self.name.clone())?;
        serde_json::from_str(&answer).with_context(|| format!("{} answers {answer:?}", self.name))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It ends when its standard input is closed.
        self.orders = None;
        if let Err(error) = self.process.wait() {
            eprintln!("left behind: {}: {error}", self.name);
        }
    }
}

fn spawn(mut command: Command, netns: &Netns) -> Result<Child> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    // SAFETY: the closure runs between fork and exec and makes system calls only.
    unsafe {
        command.pre_exec(|| signals::reset_mask().map_err(io::Error::from).and_then(|()| keep_addresses()))
    };
    Ok(netns.run(move || command.spawn())??)
}

/// The addresses of code and data change results by a few percent, so every process uses the same ones.
fn keep_addresses() -> io::Result<()> {
    // SAFETY: the call takes a number alone.
    let before = unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) };
    if before == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
