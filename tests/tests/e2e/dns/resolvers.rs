//! Real resolvers: glibc's, musl's, dig and drill. Each one verifies that its answers come from the servers that it
//! queried; some print the server.

use std::ffi::OsStr;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::{Completion, Trial};
use redirect_tests::dns::{ABSENT, LONG, V4, V6};
use redirect_tests::{Families, Node, Stack};
use tempfile::TempDir;

use super::{A_WHILE, Scene, fresh_name};
use crate::context::{Context, for_every_kind, for_every_stack};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "dns::glibc::udp", |context, families, stack| {
        getaddrinfo(context, families, stack, Path::new("getent"), &["ahosts"], "udp")
    });
    trials.extend(for_every_kind(context, "dns::glibc::tcp", |context, families, stack| {
        getaddrinfo(context, families, stack, Path::new("getent"), &["ahosts"], "tcp")
    }));
    for (transport, options) in [("udp", "timeout:1 attempts:9"), ("tcp", "use-vc timeout:9")] {
        let name = format!("dns::glibc::waits_for_the_proxy_{transport}");
        trials.extend(for_every_stack(context, &name, move |context, stack| waits(context, stack, options)));
    }
    trials.extend(if_there(for_every_kind(context, "dns::musl", musl), "musl-gcc", "musl-tools"));
    for (name, test) in [
        ("dns::dig::udp", dig_udp as fn(&Context, Families, Stack) -> Result<()>),
        ("dns::dig::tcp", dig_tcp),
        ("dns::dig::udp_and_then_tcp", dig_udp_and_then_tcp),
        ("dns::dig::absent_name", dig_absent_name),
    ] {
        let mut of_dig = for_every_kind(context, name, test);
        // It does not query servers at v4-mapped addresses.
        of_dig.retain(|trial| !trial.name().ends_with(Stack::Mapped.label()));
        trials.extend(if_there(of_dig, "dig", "bind9-dnsutils"));
    }
    for (name, test) in [
        ("dns::drill::udp", drill_udp as fn(&Context, Families, Stack) -> Result<()>),
        ("dns::drill::tcp", drill_tcp),
    ] {
        trials.extend(if_there(for_every_kind(context, name, test), "drill", "ldnsutils"));
    }
    trials
}

/// Skips tests, visibly, if a program is missing.
fn if_there(trials: Vec<Trial>, program: &'static str, package: &str) -> Vec<Trial> {
    if std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|directory| directory.join(program).is_file())
    {
        return trials;
    }
    let skip = |trial: Trial| {
        let reason = format!("needs {program} (package {package})");
        let name = trial.name().to_owned();
        Trial::ignorable_test(name.clone(), move || {
            println!("skipped: {name}: {reason}");
            Ok(Completion::ignored_with(reason))
        })
    };
    trials.into_iter().map(skip).collect()
}

/// Runs a resolver with a `resolv.conf` that names these servers, and returns its output.
fn with_servers(
    scene: &Scene,
    servers: &[IpAddr],
    options: &str,
    program: &Path,
    arguments: &[&str],
) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let mut text = format!("options {options}\n");
    for server in servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    let (resolv_conf, nsswitch) =
        (directory.path().join("resolv.conf"), directory.path().join("nsswitch.conf"));
    fs::write(&resolv_conf, text)?;
    // Otherwise a resolver daemon of this machine may be used.
    fs::write(&nsswitch, "hosts: dns\n")?;
    let script = "mount --bind \"$1\" /etc/resolv.conf && mount --bind \"$2\" /etc/nsswitch.conf && shift 2 && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).args([&resolv_conf, &nsswitch]);
    command.arg(program).args(arguments);
    Ok(String::from_utf8(scene.pod.netns().output(command, b"")?)?)
}

fn getaddrinfo(
    context: &Context,
    families: Families,
    stack: Stack,
    program: &Path,
    arguments: &[&str],
    transport: &str,
) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let server = scene.spell(scene.server()?).ip();
    let name = fresh_name("getaddrinfo");
    let options = if transport == "tcp" { "use-vc" } else { "edns0" };
    let arguments = [arguments, &[&name]].concat();
    found(&with_servers(&scene, &[server], options, program, &arguments)?)?;
    scene.was_resolved(&name, transport)?;

    // The socket to all servers has the family of the first one.
    let name = fresh_name("getaddrinfo");
    let mut servers: Vec<_> =
        Families::Dual.iter().map(|family| scene.other.address(family)).collect::<Result<_>>()?;
    if stack.family() == redirect_ebpf::Family::Ipv6 {
        servers.reverse();
    }
    let arguments = [&arguments[..arguments.len() - 1], &[&name]].concat();
    found(&with_servers(&scene, &servers, options, program, &arguments)?)?;
    scene.server_heard_nothing()
}

/// Without a proxy the resolver gets no answer, retries, and the application notices nothing.
fn waits(context: &Context, stack: Stack, options: &str) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let scene = Scene::new(&node, Families::Dual, stack)?;
    let server = scene.spell(scene.server()?).ip();
    let name = fresh_name("outage");
    node.kill_proxy()?;
    let text = thread::scope(|scope| {
        let asked =
            scope.spawn(|| with_servers(&scene, &[server], options, Path::new("getent"), &["ahosts", &name]));
        thread::sleep(3 * A_WHILE);
        ensure!(!asked.is_finished(), "without a proxy: {:?}", asked.join());
        node.start_proxy()?;
        asked.join().map_err(|_| anyhow!("the resolver panicked"))?
    })?;
    found(&text)?;
    scene.server_heard_nothing()
}

fn found(text: &str) -> Result<()> {
    // Which of them depends on the pod's addresses.
    let found = [V4.to_string(), V6.to_string()].iter().any(|address| text.contains(address));
    ensure!(found, "no address in {text:?}");
    Ok(())
}

fn musl(context: &Context, families: Families, stack: Stack) -> Result<()> {
    const PROGRAM: &str = r#"
        #include <netdb.h>
        #include <stdio.h>
        #include <sys/socket.h>
        int main(int count, char **arguments) {
            struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
            int error = getaddrinfo(arguments[1], 0, &hints, &found);
            if (error) return fprintf(stderr, "%s\n", gai_strerror(error)), 1;
            for (; found; found = found->ai_next) {
                char text[64];
                getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof text, 0, 0, NI_NUMERICHOST);
                puts(text);
            }
        }
    "#;
    let (_directory, program) = compile(PROGRAM)?;
    getaddrinfo(context, families, stack, &program, &[], "udp")
}

/// Compiles a program with musl.
fn compile(source: &str) -> Result<(TempDir, PathBuf)> {
    let directory = tempfile::tempdir()?;
    let (input, program) = (directory.path().join("program.c"), directory.path().join("program"));
    fs::write(&input, source)?;
    let output = Command::new("musl-gcc").args(["-static", "-o"]).args([&program, &input]).output()?;
    ensure!(output.status.success(), "musl-gcc: {}", String::from_utf8_lossy(&output.stderr));
    Ok((directory, program))
}

fn dig_udp(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let name = fresh_name("dig");
    let text = dig(&scene, &name, "A", &["+notcp"], "UDP")?;
    ensure!(text.contains(&V4.to_string()), "{text}");
    scene.was_resolved(&name, "udp").map(drop)
}

fn dig_tcp(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let name = fresh_name("dig");
    let text = dig(&scene, &name, "AAAA", &["+tcp"], "TCP")?;
    ensure!(text.contains(&V6.to_string()), "{text}");
    scene.was_resolved(&name, "tcp").map(drop)
}

fn dig_udp_and_then_tcp(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let name = fresh_name(LONG.0);
    let text = dig(&scene, &name, "TXT", &[], "TCP")?;
    ensure!(text.contains("Truncated, retrying in TCP mode"), "{text}");
    ensure!(text.matches('x').count() >= LONG.1, "{text}");
    scene.was_resolved(&name, "udp").map(drop)
}

fn dig_absent_name(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let name = fresh_name(ABSENT);
    let text = dig(&scene, &name, "A", &[], "UDP")?;
    ensure!(text.contains("status: NXDOMAIN"), "{text}");
    let entry = scene.was_resolved(&name, "udp")?;
    ensure!(entry.rcode.as_deref().is_none_or(|rcode| rcode == "NXDOMAIN"), "{entry:?}");
    Ok(())
}

/// Runs dig and checks which server it prints.
fn dig(scene: &Scene, name: &str, kind: &str, arguments: &[&str], transport: &str) -> Result<String> {
    let server = scene.spell(scene.server()?).ip();
    let mut command = Command::new("dig");
    command.args([&format!("@{server}"), name, kind, "+tries=1", "+time=3"]).args(arguments);
    let text = String::from_utf8(scene.pod.netns().output(command, b"")?)?;
    let line = server_line(&text)?;
    ensure!(line.starts_with(&format!("{server}#53")), "{server} was asked: {line}");
    ensure!(line.ends_with(&format!("({transport})")), "{line}");
    Ok(text)
}

fn server_line(text: &str) -> Result<&str> {
    let line = text.lines().find_map(|line| line.strip_prefix(";; SERVER: "));
    line.with_context(|| format!("no server in {text}"))
}

fn drill_udp(context: &Context, families: Families, stack: Stack) -> Result<()> {
    drill(context, families, stack, "-u", "udp")
}

fn drill_tcp(context: &Context, families: Families, stack: Stack) -> Result<()> {
    drill(context, families, stack, "-t", "tcp")
}

fn drill(context: &Context, families: Families, stack: Stack, option: &str, transport: &str) -> Result<()> {
    let scene = Scene::new(&context.node()?, families, stack)?;
    let server = scene.spell(scene.server()?).ip();
    let name = fresh_name("drill");
    let mut command = Command::new("drill");
    command.args([option, &format!("@{server}"), &name, "A"].map(OsStr::new));
    let text = String::from_utf8(scene.pod.netns().output(command, b"")?)?;
    ensure!(text.contains(&V4.to_string()), "{text}");
    let line = server_line(&text)?;
    ensure!(line.trim() == server.to_string(), "{server} was asked: {line}");
    scene.was_resolved(&name, transport).map(drop)
}
