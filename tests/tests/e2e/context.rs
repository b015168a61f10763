//! State shared by the tests: one session, and one node for tests that do not disturb it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, anyhow, bail};
use libtest_mimic::{Completion, Failed, Trial};
use redirect_protocol::placement::Placement;
use redirect_tests::session::{Binaries, Session};
use redirect_tests::{Families, Node, ProxyKind, Stack, foreign, signals};

use crate::on_node;

/// The requirements of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Root and the usual CNI plugins.
    Root,
    /// The binaries of this workspace too.
    Binaries,
    /// Podman, the image and the chart as well.
    Container,
}

/// State shared by the tests of one placement; each placement runs the same tests on its own nodes.
pub(crate) struct Context {
    placement: Placement,
    session: Arc<Lazy<Session>>,
    node: Lazy<Node>,
}

/// Skips the test on kernels without tcx.
pub(crate) fn needs_tcx() -> Result<()> {
    if foreign::has_tcx()? { Ok(()) } else { Err(skip("the kernel has no tcx (Linux 6.6)")) }
}

/// A value created on demand, once; a failure is kept as well.
type Lazy<T> = Mutex<Option<Result<Arc<T>, String>>>;

impl Context {
    /// One for each placement.
    pub(crate) fn each() -> [Arc<Self>; 2] {
        let session = Arc::new(Lazy::default());
        [Placement::Pod, Placement::Node]
            .map(|placement| Arc::new(Self { placement, session: session.clone(), node: Lazy::default() }))
    }

    /// The proxies' placement.
    pub(crate) fn placement(&self) -> Placement {
        self.placement
    }

    /// The session.
    pub(crate) fn session(&self) -> Result<Arc<Session>> {
        let session = get(&self.session, || Session::start(Binaries::from_env()?))?;
        Ok(session.placed(self.placement))
    }

    /// The shared node. A test that stops a component of its node must use its own.
    pub(crate) fn node(&self) -> Result<Arc<Node>> {
        get(&self.node, || Node::start(&self.session()?))
    }

    /// Skips the test unless a proxy of this kind runs. `reason` completes the sentence "needs the … proxy: …".
    pub(crate) fn needs(&self, kind: ProxyKind, reason: &'static str) -> Result<()> {
        let named = match kind {
            ProxyKind::Embedded => "the embedded proxy",
            ProxyKind::Ztunnel => "a ztunnel",
        };
        if self.proxy()? == kind { Ok(()) } else { Err(skip(format!("needs {named}: {reason}"))) }
    }

    /// Skips the test in placement `node`. `reason` says what differs there.
    pub(crate) fn needs_placement_pod(&self, reason: &'static str) -> Result<()> {
        if self.placement == Placement::Pod { Ok(()) } else { Err(skip(reason)) }
    }

    /// The kind of the proxies.
    pub(crate) fn proxy(&self) -> Result<ProxyKind> {
        Ok(self.session()?.binaries().kind)
    }

    /// Ends the shared node.
    pub(crate) fn end_node(&self) {
        drop(lock(&self.node).take());
    }

    /// Ends the session after its nodes. Returns its leftovers in the kernel.
    pub(crate) fn finish(&self) -> Result<Vec<String>> {
        match lock(&self.session).take() {
            Some(Ok(session)) => session.leftovers(),
            _ => Ok(Vec::new()),
        }
    }
}

/// Skips a test that does not apply to the current proxy, placement or kernel.
#[derive(Debug)]
struct Skip(String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Ends a test that can't run here. `reason` says why.
pub(crate) fn skip(reason: impl Into<String>) -> anyhow::Error {
    Skip(reason.into()).into()
}

fn get<T>(place: &Lazy<T>, make: impl FnOnce() -> Result<Arc<T>>) -> Result<Arc<T>> {
    let mut place = lock(place);
    let made = place.get_or_insert_with(|| make().map_err(|error| format!("{error:#}")));
    made.clone().map_err(|error| anyhow!(error))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A test.
pub(crate) fn trial(
    context: &Arc<Context>,
    name: impl Into<String>,
    test: impl FnOnce(&Context) -> Result<()> + Send + 'static,
) -> Trial {
    trial_that_needs(Needs::Binaries, context, name, test)
}

/// A test with containers.
pub(crate) fn trial_in_container(
    context: &Arc<Context>,
    name: impl Into<String>,
    test: impl FnOnce(&Context) -> Result<()> + Send + 'static,
) -> Trial {
    trial_that_needs(Needs::Container, context, name, test)
}

/// A test with other requirements than usual.
pub(crate) fn trial_that_needs(
    needs: Needs,
    context: &Arc<Context>,
    name: impl Into<String>,
    test: impl FnOnce(&Context) -> Result<()> + Send + 'static,
) -> Trial {
    let (context, name) = (context.clone(), name.into());
    let (name, different) = match context.placement {
        Placement::Pod => (name, None),
        Placement::Node => (format!("node::{name}"), on_node::reason(&name)),
    };
    Trial::ignorable_test(name, move || {
        signals::check()?;
        if let Err(error) = check(needs) {
            let reason = format!("{error:#}");
            if std::env::var("REDIRECT_E2E").is_ok_and(|value| value == "require") {
                return Err(Failed::from(reason));
            }
            return Ok(Completion::ignored_with(reason));
        }
        if let Some(reason) = different {
            return Ok(Completion::ignored_with(reason));
        }
        let served = match context.placement {
            Placement::Pod => Ok(()),
            Placement::Node => context.needs(ProxyKind::Embedded, "a ztunnel's listeners are in pods"),
        };
        match served.and_then(|()| test(&context)) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => match error.downcast_ref::<Skip>() {
                Some(skip) => Ok(Completion::ignored_with(skip.to_string())),
                None => Err(Failed::from(format!("{error:#}"))),
            },
        }
    })
}

fn check(needs: Needs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root");
    }
    let plugins = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];
    if !plugins.iter().any(|directory| std::path::Path::new(directory).join("bridge").exists()) {
        bail!("needs the CNI plugins (bridge, host-local) in one of {plugins:?}");
    }
    if needs != Needs::Root {
        Binaries::from_env()?.check()?;
    }
    if needs == Needs::Container { crate::container::check() } else { Ok(()) }
}

/// One test for every kind of pod and every stack that such a pod can speak: `group::dual::v4_mapped` and so on.
pub(crate) fn for_every_kind(
    context: &Arc<Context>,
    group: &str,
    test: impl Fn(&Context, Families, Stack) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let kinds = Families::ALL.into_iter();
    let cases = kinds.flat_map(|families| families.stacks().map(move |stack| (families, stack)));
    let trial = |(families, stack): (Families, Stack)| {
        let name = format!("{group}::{}::{}", families.label(), stack.label());
        trial(context, name, move |context| test(context, families, stack))
    };
    cases.map(trial).collect()
}

/// One test for every stack, in dual-stack pods: `group::v4_mapped` and so on.
pub(crate) fn for_every_stack(
    context: &Arc<Context>,
    group: &str,
    test: impl Fn(&Context, Stack) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let trial = |stack: Stack| {
        trial(context, format!("{group}::{}", stack.label()), move |context| test(context, stack))
    };
    Stack::ALL.into_iter().map(trial).collect()
}

/// As [`for_every_stack`], for tests that differ in placement `node` for this reason.
pub(crate) fn for_every_stack_in_pods(
    context: &Arc<Context>,
    group: &str,
    reason: &'static str,
    test: impl Fn(&Context, Stack) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    for_every_stack(context, group, move |context, stack| {
        context.needs_placement_pod(reason)?;
        test(context, stack)
    })
}
