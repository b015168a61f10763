//! Shows what ambient-redirect does: a client speaks every kind of IP with servers of every kind, and a table tells what
//! each side and the node proxy saw. Everything happens in namespaces that are gone at the end.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use redirect_protocol::placement::Placement;
use redirect_tests::echo::Hello;
use redirect_tests::process::Process;
use redirect_tests::session::Binaries;
use redirect_tests::stack::canonical;
use redirect_tests::{
    Direction, Entry, Families, Netns, Node, Pod, PodSpec, Session, Stack, signals, testbed,
};
use serde::Deserialize;

const PORT: u16 = 9000;

/// Runs a node with pods, agent and proxy, and shows who gets whose connections.
#[derive(Debug, Parser)]
struct Arguments {
    /// The binary `redirect` [default: next to this one, or $REDIRECT_BIN].
    #[arg(long)]
    redirect: Option<PathBuf>,
    /// The CNI plugin `redirect-cni` [default: next to this one, or $REDIRECT_CNI_BIN].
    #[arg(long)]
    plugin: Option<PathBuf>,
    /// Where the node proxy's listeners are.
    #[arg(long, value_enum, default_value_t)]
    placement: Placement,
    /// Keep everything up until Ctrl-C, to look around.
    #[arg(long)]
    keep: bool,
    /// What this program is inside the pods.
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// An application in a pod.
    #[command(subcommand, hide = true)]
    Testbed(testbed::Application),
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(Role::Testbed(application)) = arguments.role {
        testbed::run(application)?;
        return Ok(ExitCode::SUCCESS);
    }
    signals::install()?;
    let session = Session::start(binaries(&arguments)?)?;
    let right = demonstrate(&session.placed(arguments.placement), arguments.keep);
    let left = session.leftovers()?;
    for thing in &left {
        eprintln!("left behind: {thing}");
    }
    Ok(if right? && left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn binaries(arguments: &Arguments) -> Result<Binaries> {
    let mut binaries = Binaries::from_env()?;
    let beside = |name: &str| sibling(name).ok().filter(|path| path.is_file());
    let embedded = binaries.proxy == binaries.redirect;
    if std::env::var_os("REDIRECT_BIN").is_none() || arguments.redirect.is_some() {
        binaries.redirect = arguments.redirect.clone().or(beside("redirect")).unwrap_or(binaries.redirect);
    }
    if std::env::var_os("REDIRECT_CNI_BIN").is_none() || arguments.plugin.is_some() {
        binaries.plugin = arguments.plugin.clone().or(beside("redirect-cni")).unwrap_or(binaries.plugin);
    }
    if embedded {
        binaries.proxy = binaries.redirect.clone();
    }
    binaries.check()?;
    Ok(binaries)
}

fn sibling(name: &str) -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}

/// A pod with a server in it.
struct Application {
    // The process ends before its pod does.
    _process: Process,
    pod: Pod,
    greeting: &'static str,
    enrolled: bool,
}

impl Application {
    fn start(node: &Arc<Node>, spec: PodSpec, greeting: &'static str) -> Result<Self> {
        let enrolled = spec.enrolled;
        let pod = Pod::start(node, spec)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["testbed", "tcp-echo", "--greeting", greeting]);
        for family in pod.families().iter() {
            let any = if family == redirect_ebpf::Family::Ipv4 { "0.0.0.0" } else { "[::]" };
            command.args(["--listen", &format!("{any}:{PORT}")]);
        }
        let log = node.dir().join(format!("{}.log", pod.identity().namespace));
        let applications = node.session().applications();
        let mut process = Process::spawn(greeting, command, pod.netns(), applications, &log)?;
        process.wait_until("listening server", || {
            Ok(std::fs::read_to_string(&log).is_ok_and(|text| text.contains("listening")))
        })?;
        Ok(Self { _process: process, pod, greeting, enrolled })
    }
}

fn demonstrate(session: &Arc<Session>, keep: bool) -> Result<bool> {
    let node = Node::start(session)?;
    let sleep = Pod::start(&node, PodSpec::new("sleep", Families::Dual))?;
    let server = |namespace: &str, families| PodSpec::new("tcp-echo", families).in_namespace(namespace);
    let servers = [
        Application::start(&node, server("dual-stack", Families::Dual), "hello dualstack")?,
        Application::start(&node, server("ipv4", Families::V4Only), "hello ipv4")?,
        Application::start(&node, server("ipv6", Families::V6Only), "hello ipv6")?,
        Application::start(&node, server("no-mesh", Families::Dual).not_enrolled(), "hello no-mesh")?,
    ];
    let outsider = &servers[3].pod;

    let mut rows = Vec::new();
    for server in &servers {
        for stack in server.pod.families().stacks() {
            rows.push(Row::measure(&sleep, true, server, stack)?);
        }
    }
    for stack in Stack::ALL {
        rows.push(Row::measure(outsider, false, &servers[0], stack)?);
    }
    println!("{}", table(&rows));
    let wrong = rows.iter().filter(|row| !row.is_right()).count();
    println!("{} of {} connections as they should be", rows.len() - wrong, rows.len());
    if keep {
        hold(&node, &sleep, &servers);
    }
    Ok(wrong == 0)
}

/// What `testbed client` prints.
#[derive(Debug, Default, Deserialize)]
struct Answer {
    heard: Option<Hello>,
    getpeername: Option<SocketAddr>,
    getsockname: Option<SocketAddr>,
    error: Option<String>,
}

/// One connection, as everyone saw it.
struct Row {
    stack: Stack,
    client: String,
    client_enrolled: bool,
    server: String,
    server_enrolled: bool,
    greeting: &'static str,
    to: SocketAddr,
    answer: Answer,
    outbound: Vec<Entry>,
    inbound: Vec<Entry>,
}

impl Row {
    fn measure(client: &Pod, client_enrolled: bool, server: &Application, stack: Stack) -> Result<Self> {
        signals::check()?;
        let to = server.pod.endpoint(stack.family(), PORT)?;
        let log = client.node().access_log();
        let known = log.entries()?.len();
        let mut command = Command::new(std::env::current_exe()?);
        let family = match stack {
            Stack::V4 => "v4",
            Stack::V6 => "v6",
            Stack::Mapped => "mapped",
        };
        command.args(["testbed", "client", "--family", family, "--to", &to.to_string()]);
        let output = client.netns().output(command, b"")?;
        let answer = serde_json::from_slice(&output).context("answer of the client")?;
        // The log is written by another process: a moment for an entry that should not be there.
        thread::sleep(Duration::from_millis(50));
        let new: Vec<Entry> = log.entries()?.into_iter().skip(known).collect();
        let of = |pod: &Pod, direction| {
            let name = pod.identity().to_string();
            let opened = redirect_tests::access_log::Event::Open;
            let matches =
                |entry: &&Entry| entry.event == opened && entry.pod == name && entry.direction == direction;
            new.iter().filter(matches).cloned().collect::<Vec<_>>()
        };
        Ok(Self {
            stack,
            client: client.identity().to_string(),
            client_enrolled,
            server: server.pod.identity().to_string(),
            server_enrolled: server.enrolled,
            greeting: server.greeting,
            to,
            outbound: of(client, Direction::Outbound),
            inbound: of(&server.pod, Direction::Inbound),
            answer,
        })
    }

    fn is_right(&self) -> bool {
        let (Some(heard), Some(peer_name), Some(local_name)) =
            (&self.answer.heard, self.answer.getpeername, self.answer.getsockname)
        else {
            return false;
        };
        let source = canonical(local_name);
        let seen = |entries: &[Entry], enrolled: bool| {
            entries.len() == usize::from(enrolled)
                && entries.iter().all(|entry| {
                    entry.is_of(self.stack.family())
                        && entry.source.ip() == source.ip()
                        && entry.original_destination == self.to
                })
        };
        heard.greeting == self.greeting
            && heard.peer.ip() == source.ip()
            && peer_name == self.stack.spell(self.to)
            && seen(&self.outbound, self.client_enrolled)
            && seen(&self.inbound, self.server_enrolled)
    }

    fn cells(&self) -> [String; 8] {
        let heard = self.answer.heard.as_ref();
        let show = |entries: &[Entry]| {
            let lines =
                entries.iter().map(|entry| format!("{}\n→ {}", entry.source, entry.original_destination));
            if entries.is_empty() { "–".to_owned() } else { lines.collect::<Vec<_>>().join("\n") }
        };
        let error = self.answer.error.clone().unwrap_or_default();
        [
            self.stack.to_string(),
            format!("{}\n→ {}", self.client, self.server),
            heard.map_or(error, |heard| heard.greeting.clone()),
            show(&self.outbound),
            show(&self.inbound),
            heard.map_or_else(String::new, |heard| heard.peer.to_string()),
            self.answer.getpeername.map_or_else(String::new, |address| address.to_string()),
            if self.is_right() { "✓" } else { "✗" }.to_owned(),
        ]
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "client's socket",
        "client → server",
        "heard",
        "proxy, outbound:\nsource → dialled",
        "proxy, inbound:\nsource → dialled",
        "client, as the\nserver sees it",
        "getpeername\nat the client",
        "",
    ]);
    for row in rows {
        table.add_row(row.cells());
    }
    table
}

fn hold(node: &Node, sleep: &Pod, servers: &[Application]) {
    let redirect = node.session().binaries().redirect.display();
    let socket = node.agent_socket();
    let socket = socket.display();
    println!("\nEverything is up until Ctrl-C. Try:");
    println!("  {redirect} status --socket {socket}");
    println!("  {redirect} pods --socket {socket}");
    println!("  tail -f {}", node.access_log().files().display());
    let inside = |netns: &Netns| format!("nsenter --net={}", netns.path().display());
    println!("  {} ip rule", inside(sleep.proxy_netns()));
    if let Some(server) = servers.first()
        && let Ok(program) = std::env::current_exe()
    {
        for (family, kind) in [(redirect_ebpf::Family::Ipv4, "v4"), (redirect_ebpf::Family::Ipv6, "v6")] {
            if let Ok(to) = server.pod.endpoint(family, PORT) {
                println!("  {}", client_command(&inside(sleep.netns()), &program, kind, to, node.session()));
            }
        }
    }
    while !signals::interrupted() {
        thread::sleep(Duration::from_millis(100));
    }
}

/// Outbound programs see the processes of the session's cgroup only, so the client has to join it first.
fn client_command(inside: &str, program: &Path, kind: &str, to: SocketAddr, session: &Session) -> String {
    let entrance = session.applications().path().join("cgroup.procs");
    format!(
        "sh -c 'echo $$ > {} && exec {inside} {} testbed client --family {kind} --to {to}'",
        entrance.display(),
        program.display()
    )
}
