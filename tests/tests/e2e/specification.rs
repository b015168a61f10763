//! `redirect explain` agrees with the specification for any connection ([`redirect_tests::specification`]).

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use libtest_mimic::Trial;
use proptest::test_runner::{Config as Cases, TestCaseError, TestRunner};
use redirect_protocol::wire::{Explanation, Reply, Request, Transport, client};
use redirect_tests::specification::cases::{Addresses, cases};
use redirect_tests::specification::{self, Case, Excluded, Facts, Sender, Verdict, Way, What};
use redirect_tests::{Families, Node, Pod, Stack, wait};

use crate::context::{Context, for_every_stack};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    for_every_stack(context, "specification::explain", explain)
}

/// The node's exclusions.
const NETWORKS: [(&str, u8); 4] =
    [("10.0.0.8", 29), ("255.255.255.254", 31), ("fd00::8", 125), ("fe80::", 64)];
const PORTS: [u16; 2] = [8443, 15000];

fn explain(context: &Context, stack: Stack) -> Result<()> {
    let networks = NETWORKS.map(|(address, length)| format!("{address}/{length}")).join(",");
    let ports = PORTS.map(|port| port.to_string()).join(",");
    for passes in [true, false] {
        let arguments = ["--exclude-outbound-networks", &networks, "--exclude-outbound-ports", &ports];
        let link_local = ["--link-local", if passes { "pass" } else { "drop" }];
        let arguments = [&arguments[..], &link_local].concat();
        let node = Node::with_arguments(&context.session()?, &arguments)?;
        let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.enrolled("other", Families::Dual)?);
        explains(&pod, &other, stack, passes)?;
    }
    Ok(())
}

fn explains(pod: &Pod, other: &Pod, stack: Stack, link_local_passes: bool) -> Result<()> {
    let addresses = Addresses { own: pod.addresses().to_vec(), others: other.addresses().to_vec() };
    let networks = NETWORKS.map(|(address, length)| Ok((address.parse()?, length)));
    let excluded_outbound =
        Excluded { networks: networks.into_iter().collect::<Result<_>>()?, ports: PORTS.to_vec() };
    let whats = &[What::Opens, What::Datagram];
    let placement = pod.node().session().placement();
    let calls = cases(placement, stack.family(), Way::Out, whats, &[Sender::Anybody], &addresses);
    let mut runner = TestRunner::new(Cases { cases: 200, failure_persistence: None, ..Cases::default() });
    let outcome = runner.run(&calls, |case| {
        let facts = Facts {
            own: addresses.own.clone(),
            excluded_outbound: excluded_outbound.clone(),
            dns: true,
            link_local_passes,
            ..Facts::default()
        };
        let case = Case { pod: facts, ..case };
        let answer = ask(pod, stack, &case).map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        let (wanted, actual) = (specification::call(&case), verdict(&answer)?);
        let captured = matches!(wanted, Verdict::Captured | Verdict::Resolved);
        if actual == wanted && answer.captured == captured {
            Ok(())
        } else {
            Err(TestCaseError::fail(format!("not {wanted:?} but {answer:#?}")))
        }
    });
    outcome.map_err(|error| anyhow!("{error}"))
}

fn ask(pod: &Pod, stack: Stack, case: &Case) -> Result<Explanation> {
    let request = Request::Explain {
        from: pod.identity().to_string(),
        to: stack.spell(case.destination.into()),
        transport: if case.what == What::Datagram { Transport::Udp } else { Transport::Tcp },
    };
    let mut replies = client::call(&pod.node().agent_socket(), &request, None, wait::patient(wait::SOON))?;
    match replies.pop().context("no reply")? {
        Reply::Explained(explanation) => Ok(*explanation),
        other => bail!("{other:?}"),
    }
}

fn verdict(explanation: &Explanation) -> Result<Verdict, TestCaseError> {
    let words = [
        ("captured: goes to the node proxy's resolver", Verdict::Resolved),
        ("captured: goes to the node proxy", Verdict::Captured),
        ("left alone", Verdict::Passes),
        ("refused", Verdict::Stopped),
    ];
    let found = words.into_iter().find(|(words, _)| explanation.verdict.starts_with(words));
    found.map(|(_, verdict)| verdict).ok_or_else(|| TestCaseError::fail(explanation.verdict.clone()))
}
