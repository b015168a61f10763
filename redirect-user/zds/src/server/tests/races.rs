//! Random sequences of pods and proxies that come and go: in the end the newest proxy serves exactly the wanted pods,
//! and no proxy ever saw a breach of the protocol.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::double::{Proxy, Reply};
use super::{Fixture, eventually, identity, quick};
use crate::messages::Request;

#[derive(Clone, Debug)]
enum Operation {
    Add {
        uid: u8,
        netns: u8,
    },
    Remove {
        uid: u8,
    },
    /// A proxy that refuses every `refuses`-th pod; 0 refuses none.
    Connect {
        refuses: u8,
    },
    Disconnect {
        proxy: u8,
    },
    /// Gives the server a moment to proceed.
    Pause {
        microseconds: u16,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => (0..5_u8, 0..3_u8).prop_map(|(uid, netns)| Operation::Add { uid, netns }),
        3 => (0..5_u8).prop_map(|uid| Operation::Remove { uid }),
        2 => prop_oneof![Just(0_u8), 2..4_u8].prop_map(|refuses| Operation::Connect { refuses }),
        1 => any::<u8>().prop_map(|proxy| Operation::Disconnect { proxy }),
        3 => (0..800_u16).prop_map(|microseconds| Operation::Pause { microseconds }),
    ]
}

async fn connect(fixture: &Fixture, refuses: u8) -> Proxy {
    let mut count = 0_u8;
    Proxy::scripted(&fixture.path, move |request| {
        if !matches!(request, Request::Add(_)) || refuses == 0 {
            return Reply::Ack;
        }
        count = count.wrapping_add(1);
        if count.is_multiple_of(refuses) { Reply::Nack("not now".into()) } else { Reply::Ack }
    })
    .await
}

async fn run(operations: Vec<Operation>) {
    let fixture = Fixture::start(quick());
    let mut proxies: Vec<Proxy> = Vec::new();
    let mut gone = Vec::new();
    let mut wanted = BTreeMap::new();
    for operation in operations {
        match operation {
            Operation::Add { uid, netns } => {
                let (uid, netns) = (format!("pod-{uid}"), format!("netns-{netns}"));
                fixture.handle.set(fixture.workload(&uid, &netns)).unwrap();
                wanted.insert(uid, identity(fixture.netns(&netns)));
            }
            Operation::Remove { uid } => {
                let uid = format!("pod-{uid}");
                fixture.handle.unset(&uid);
                wanted.remove(&uid);
            }
            Operation::Connect { refuses } if proxies.len() < 4 => {
                proxies.push(connect(&fixture, refuses).await);
            }
            Operation::Disconnect { proxy } if !proxies.is_empty() => {
                let proxy = proxies.remove(usize::from(proxy) % proxies.len());
                gone.push(proxy.leave().await);
            }
            Operation::Connect { .. } | Operation::Disconnect { .. } => {}
            Operation::Pause { microseconds } => {
                tokio::time::sleep(std::time::Duration::from_micros(microseconds.into())).await;
            }
        }
    }
    if proxies.is_empty() {
        proxies.push(connect(&fixture, 0).await);
    }

    eventually("the newest serves what is wanted, the others nothing else", || {
        proxies.iter().rev().enumerate().all(|(age, proxy)| {
            let seen = proxy.seen();
            let within = seen.served.iter().all(|(uid, netns)| wanted.get(uid) == Some(netns));
            seen.synced && within && (age > 0 || seen.served == wanted)
        })
    })
    .await;
    eventually("the server knows", || {
        fixture.handle.proxies().first().is_some_and(|newest| {
            newest.synced && newest.acknowledged == wanted.len() && newest.refused.is_empty()
        })
    })
    .await;
    for proxy in &proxies {
        proxy.check();
        assert!(!proxy.ended(), "a proxy that kept to the contract was closed");
    }
    for seen in gone {
        let violations = &seen.lock().unwrap().violations;
        assert!(violations.is_empty(), "{violations:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_newest_proxy_ends_up_with_what_is_wanted(
        operations in proptest::collection::vec(operation(), 0..40),
        threads in any::<bool>(),
    ) {
        let mut builder = if threads {
            tokio::runtime::Builder::new_multi_thread()
        } else {
            tokio::runtime::Builder::new_current_thread()
        };
        let runtime = builder.worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(run(operations));
    }
}
