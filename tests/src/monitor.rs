//! A running `redirect monitor`.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail};
use redirect_protocol::wire::FlowReport;

use crate::node::Node;
use crate::wait::{self, SOON};

/// A monitor; killed when dropped.
#[derive(Debug)]
pub struct Monitor {
    child: Child,
    heard: Arc<Mutex<Vec<FlowReport>>>,
    reader: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts it, and waits until it misses no events.
    pub fn start(node: &Node, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(&node.session().binaries().redirect);
        command.arg("monitor").args(arguments).arg("--socket").arg(node.agent_socket()).args(["-o", "json"]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("redirect monitor")?;
        let (out, err) = child.stdout.take().zip(child.stderr.take()).context("pipes")?;
        let heard = Arc::<Mutex<Vec<FlowReport>>>::default();
        let into = Arc::clone(&heard);
        let reader = thread::spawn(move || {
            let flows = BufReader::new(out).lines().map_while(Result::ok);
            flows.filter_map(|line| serde_json::from_str(&line).ok()).for_each(|flow| {
                into.lock().unwrap_or_else(PoisonError::into_inner).push(flow);
            });
        });
        let mut monitor = Self { child, heard, reader: Some(reader) };
        let mut first = String::new();
        BufReader::new(err).read_line(&mut first)?;
        if !first.contains("monitoring") {
            monitor.kill()?;
            bail!("redirect monitor: {first}");
        }
        Ok(monitor)
    }

    /// The events so far.
    #[must_use]
    pub fn heard(&self) -> Vec<FlowReport> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for an event.
    pub fn hears(&self, what: &str, is: impl Fn(&FlowReport) -> bool) -> Result<FlowReport> {
        wait::until(what, SOON, || Ok(self.heard().into_iter().find(&is)))
            .with_context(|| format!("{:#?}", self.heard()))
    }

    /// Kills it, as an impatient operator does.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.wait().map(drop)
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let status = wait::until("end of redirect monitor", SOON, || Ok(self.child.try_wait()?))?;
        if self.reader.take().is_some_and(|reader| reader.join().is_err()) {
            bail!("the reader of redirect monitor panicked");
        }
        Ok(status)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
