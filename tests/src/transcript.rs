//! Records commands and their output from a real run for the documentation. Values that differ from run to run (times,
//! addresses, ports, cookies, directories) are replaced.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use redirect_ebpf::Family;
use redirect_linux::netns::NetNs;

use crate::connection::dial;
use crate::node::Node;
use crate::pod::{Pod, PodSpec};
use crate::server::Server;
use crate::session::Session;
use crate::stack::{Families, Stack};
use crate::wait::SOON;

const PORT: u16 = 9000;

const HEAD: &str = "# The CLI at work\n\n\
    `cargo xtask transcript` writes this file from a real run. It replaces times, addresses, ports and cookies, and leaves out \
    options that\nname the run's own sockets and directories. `shop/sleep` and `shop/tcp-echo` are enrolled dual-stack pods.\n";

/// The document of this run.
pub fn record(session: &Arc<Session>) -> Result<String> {
    // Nothing is repaired before it was looked at.
    let node =
        Node::with_arguments(session, &["--check-interval", "3600", "--service-account", "shop/*=shop"])?;
    let pod = |name: &str| Pod::start(&node, PodSpec::new(name, Families::Dual).in_namespace("shop"));
    let (sleep, echo) = (pod("sleep")?, pod("tcp-echo")?);
    let _servers = [Stack::V4, Stack::V6].map(|stack| Server::start(echo.netns(), stack, PORT, "hello"));
    let mut transcript = Transcript::new(&node, &[&sleep, &echo])?;
    transcript.say("Watch connections", MONITOR);
    transcript.monitor(&sleep, &echo)?;

    let to = echo.endpoint(Family::Ipv6, PORT)?.to_string();
    let explain = ["explain", "--from", "shop/sleep", "--to", &to];
    transcript.say("Explain a connection", EXPLAIN);
    transcript.run(&explain, &[])?;

    transcript.say("A broken pod", BROKEN);
    sleep.netns().set_sysctl("net.ipv6.fwmark_reflect", "0")?;
    transcript.run(&explain, &[])?;
    transcript.run(&["pod", "shop/sleep"], &[])?;

    transcript.say("The node", DOCTOR);
    let (state, conf, bin) = (node.state_dir(), node.dir().join("net.d"), node.dir().join("bin"));
    let mut arguments = Vec::new();
    for (name, path) in [("--state-dir", &state), ("--cni-conf-dir", &conf), ("--cni-bin-dir", &bin)] {
        arguments.extend([name.to_owned(), path.display().to_string()]);
    }
    transcript.run(&["doctor"], &arguments)?;
    Ok(transcript.text)
}

const MONITOR: &str = "The pod connects to a server in IPv4, in IPv6 and with a v4-mapped socket, then to a closed port of its \
    own. The monitor\nalso reports the node proxy's onward connections.";
const EXPLAIN: &str = "";
const BROKEN: &str = "Something turns the sysctl `net.ipv6.fwmark_reflect` off in the pod. (The agent would repair that, but \
    resyncs only\nonce an hour here.)";
const DOCTOR: &str = "This node has no CNI configuration, which is a warning. Exit code 2 would mean that the node cannot run the \
    data path.";

/// The part of the document that must be the same in every run: everything except the doctor's findings about
/// the kernel.
#[must_use]
pub fn shape(document: &str) -> Vec<String> {
    let mut doctor = false;
    let lines = document.lines().filter_map(|line| {
        if line.starts_with("$ ") {
            doctor = line == "$ redirect doctor";
        } else if doctor && line.starts_with(' ') {
            // A check's name ends with two spaces; what belongs to the check before begins with more.
            let (name, _) = line.trim_start_matches(' ').split_once("  ")?;
            return (!line.starts_with("  ")).then(|| name.to_owned());
        }
        // The width of columns depends on the addresses.
        Some(line.split_whitespace().collect::<Vec<_>>().join(" "))
    });
    lines.collect()
}

struct Transcript {
    text: String,
    program: String,
    socket: String,
    /// The node's.
    netns: NetNs,
    /// The replacements.
    names: Vec<(String, String)>,
    ports: BTreeMap<u16, u16>,
    cookies: BTreeMap<String, usize>,
}

impl Transcript {
    fn new(node: &Node, pods: &[&Pod]) -> Result<Self> {
        let session = node.session();
        let mut names = vec![
            (node.dir().join("net.d").display().to_string(), "/etc/cni/net.d".to_owned()),
            (node.dir().join("bin").display().to_string(), "/opt/cni/bin".to_owned()),
            (session.cgroup().path().display().to_string(), "/sys/fs/cgroup".to_owned()),
            // The test's node is not the initial namespace, which alone has this sysctl.
            ("absent: this kernel always compiles programs".to_owned(), "1".to_owned()),
        ];
        for (number, pod) in pods.iter().enumerate() {
            names.push((pod.address(Family::Ipv4)?.to_string(), format!("10.0.1.{}", 10 + number)));
            names.push((pod.address(Family::Ipv6)?.to_string(), format!("fd00::{:x}", 0x10a + number)));
        }
        Ok(Self {
            text: HEAD.to_owned(),
            netns: NetNs::open(&node.netns().path())?,
            program: session.binaries().redirect.display().to_string(),
            socket: node.agent_socket().display().to_string(),
            names,
            ports: BTreeMap::new(),
            cookies: BTreeMap::new(),
        })
    }

    fn say(&mut self, title: &str, words: &str) {
        let _ = write!(self.text, "\n## {title}\n");
        if !words.is_empty() {
            let _ = write!(self.text, "\n{words}\n");
        }
    }

    fn write(&mut self, command: &str, output: &str, code: Option<i32>) {
        let _ = write!(self.text, "\n```console\n$ {command}\n{output}");
        if let Some(code) = code.filter(|code| *code != 0) {
            let _ = writeln!(self.text, "$ echo $?\n{code}");
        }
        self.text += "```\n";
    }

    /// Runs one of our commands, and records its output.
    fn run(&mut self, shown: &[&str], more: &[String]) -> Result<()> {
        let mut command = Command::new(&self.program);
        command.args(shown).args(more);
        if shown != ["doctor"] {
            command.args(["--socket", &self.socket]);
        }
        // As on a node: `doctor` checks the host's network namespace.
        let Output { status, stdout, stderr } = self.netns.run(|| command.output())??;
        ensure!(stderr.is_empty(), "{shown:?}: {}", String::from_utf8_lossy(&stderr));
        let output = self.normal(&String::from_utf8(stdout)?);
        let command = self.normal(&format!("redirect {}", shown.join(" ")));
        self.write(command.trim_end(), &output, status.code());
        Ok(())
    }

    /// Three connections, including the proxy's own, and a refused one.
    fn monitor(&mut self, from: &Pod, to: &Pod) -> Result<()> {
        let shown = ["monitor", "--pod", "shop/sleep", "--count", "7"];
        let mut child = Command::new(&self.program)
            .args(shown)
            .args(["--socket", &self.socket])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut listening = String::new();
        BufReader::new(child.stderr.take().context("a pipe")?).read_line(&mut listening)?;
        let connect = || -> Result<()> {
            ensure!(listening.contains("monitoring"), "{listening}");
            for stack in Stack::ALL {
                from.connect(stack, to.endpoint(stack.family(), PORT)?)?;
            }
            let closed: SocketAddr = "[::1]:9".parse()?;
            ensure!(from.netns().run(|| dial(Stack::V6, closed, SOON))?.is_err());
            Ok(())
        };
        if let Err(error) = connect() {
            child.kill()?;
            child.wait()?;
            return Err(error);
        }
        let output = child.wait_with_output()?;
        let lines = String::from_utf8(output.stdout)?;
        let output = lines.lines().map(|line| self.flow(line) + "\n").collect::<String>();
        self.write(&format!("redirect {}", shown.join(" ")), &output, None);
        Ok(())
    }

    /// A line of `redirect monitor`.
    fn flow(&mut self, line: &str) -> String {
        const FIRST: u16 = 40001;
        let mut normal = line.to_owned();
        let (mut last, mut time) = ("", true);
        for word in line.split_whitespace() {
            if std::mem::take(&mut time) {
                normal = normal.replacen(word, "2026-01-01T12:00:00.000Z", 1);
            } else if last == "socket" && word != "-" {
                let number = self.cookies.len() + 1;
                let number = *self.cookies.entry(word.to_owned()).or_insert(number);
                normal = normal.replace(&format!("socket {word}"), &format!("socket {number}"));
            } else if let Ok(end) = word.parse::<SocketAddr>()
                && ![PORT, 9, 0].contains(&end.port())
            {
                let next = FIRST + self.ports.len() as u16;
                let port = *self.ports.entry(end.port()).or_insert(next);
                normal = normal.replacen(word, &SocketAddr::new(end.ip(), port).to_string(), 1);
            }
            last = word;
        }
        self.normal(&normal).trim_end().to_owned()
    }

    fn normal(&self, text: &str) -> String {
        let mut normal = String::new();
        for line in text.lines() {
            let mut line = line.to_owned();
            // How long the pod has been enrolled.
            if line.starts_with(" shop/sleep ") {
                line = line
                    .trim_end()
                    .rsplit_once(' ')
                    .map_or_else(String::new, |(rest, _)| format!("{rest} 3s"));
            }
            for (name, other) in &self.names {
                line = line.replace(name, other);
            }
            // The CNI plugin chooses a random name for the device on the node.
            let words = line.split_inclusive(' ');
            line = words.map(|word| if word.starts_with("veth") { "veth1" } else { word }).collect();
            normal += line.trim_end();
            normal += "\n";
        }
        normal
    }
}
