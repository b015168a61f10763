//! Replays every target's corpus, and mutates it for a bounded time. `REDIRECT_FUZZ_CASES` is the number of mutations per
//! target.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};
use redirect_agent::install;
use redirect_fuzz::TARGETS;
use redirect_protocol::wire;
use redirect_zds::WorkloadRequest;

/// Bytes at which parsers branch.
const BYTES: [u8; 12] = [0, 1, 4, 0x11, 0x2c, 0x3a, 0x45, 0x60, 0x7f, 0x80, 0xfe, 0xff];

/// Words at which parsers of JSON branch.
const WORDS: [&str; 14] = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "\"\"",
    "[]",
    "{}",
    "\\u0000",
    "\\ud800",
    "::ffff:1.2.3.4",
    "fe80::1%eth0",
    "{\"type\":\"redirect-cni\"},",
];

#[derive(Clone, Debug)]
enum Mutation {
    Set(Index, u8),
    Flip(Index, u8),
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    /// Repeats a part of itself.
    Copy(Index, Index, usize),
    /// Continue as another input of the corpus.
    Splice(Index, Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let byte = prop_oneof![any::<u8>(), select(&BYTES[..])];
    let word = select(&WORDS[..]).prop_map(|word| word.as_bytes().to_vec());
    prop_oneof![
        (any::<Index>(), byte).prop_map(|(place, byte)| Mutation::Set(place, byte)),
        (any::<Index>(), 0..8u8).prop_map(|(place, bit)| Mutation::Flip(place, 1 << bit)),
        (any::<Index>(), 1..32usize).prop_map(|(place, length)| Mutation::Remove(place, length)),
        (any::<Index>(), prop_oneof![vec(any::<u8>(), 1..8), word])
            .prop_map(|(place, bytes)| Mutation::Insert(place, bytes)),
        (any::<Index>(), any::<Index>(), 1..64usize)
            .prop_map(|(from, to, length)| Mutation::Copy(from, to, length)),
        (any::<Index>(), any::<Index>()).prop_map(|(place, other)| Mutation::Splice(place, other)),
    ]
}

impl Mutation {
    fn apply(&self, data: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        // One more than its length, so that the end is a position as well.
        let places = data.len() + 1;
        let place = |index: &Index| index.index(places);
        match self {
            Self::Set(index, byte) => data.iter_mut().skip(place(index)).take(1).for_each(|at| *at = *byte),
            Self::Flip(index, bit) => data.iter_mut().skip(place(index)).take(1).for_each(|at| *at ^= bit),
            Self::Remove(index, length) => {
                let begin = place(index);
                drop(data.drain(begin..(begin + length).min(data.len())));
            }
            Self::Insert(index, bytes) => {
                data.splice(place(index)..place(index), bytes.iter().copied());
            }
            Self::Copy(from, to, length) => {
                let (from, to) = (place(from), place(to));
                let part = data[from..(from + length).min(data.len())].to_vec();
                drop(data.splice(to..to, part));
            }
            Self::Splice(index, other) => {
                let begin = place(index);
                data.truncate(begin);
                data.extend(other.get(corpus).iter().skip(begin));
            }
        }
    }
}

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let files = fs::read_dir(&folder).expect("a corpus").map(|entry| entry.expect("a file").path());
    let mut files: Vec<_> =
        files.map(|path| (path.clone(), fs::read(path).expect("a readable file"))).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
}

#[test]
fn the_corpora_keep_every_promise() {
    for (name, target) in TARGETS {
        for (path, data) in corpus(name) {
            println!("{}", path.display());
            target(&data);
        }
    }
}

#[test]
fn so_do_mutations_of_them() {
    let cases =
        std::env::var("REDIRECT_FUZZ_CASES").ok().and_then(|number| number.parse().ok()).unwrap_or(5000);
    for (name, target) in TARGETS {
        let corpus: Vec<Vec<u8>> = corpus(name).into_iter().map(|(_, data)| data).collect();
        let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
        let result = runner.run(&(any::<Index>(), vec(mutation(), 0..12)), |(seed, mutations)| {
            let mut data = seed.get(&corpus).clone();
            mutations.iter().for_each(|mutation| mutation.apply(&mut data, &corpus));
            let shown = data.escape_ascii().to_string();
            std::panic::catch_unwind(|| target(&data)).map_err(|panic| {
                let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                TestCaseError::fail(format!("{name}: {text}\ninput: b\"{shown}\""))
            })
        });
        if let Err(error) = result {
            panic!("{error}");
        }
    }
}

/// A corpus that no parser accepts any more would find nothing.
#[test]
fn the_corpora_get_past_the_readers() {
    let data = |target: &str, name: &str| {
        let files = corpus(target).into_iter();
        let mut named = files.filter(|(path, _)| path.ends_with(name)).map(|(_, data)| data);
        named.next().unwrap_or_else(|| panic!("no {target}/{name}"))
    };
    for request in ["add", "del", "check", "gc", "gc-part", "ready", "status", "pods", "pod", "explain"] {
        assert!(wire::decode::<wire::Request>(&data("wire", request)).is_ok(), "{request}");
    }
    for reply in ["done", "added", "error"] {
        assert!(wire::decode::<wire::Reply>(&data("wire", reply)).is_ok(), "{reply}");
    }
    for request in ["add", "del", "snapshot-sent", "keep"] {
        let request = redirect_zds::packet::decode::<WorkloadRequest>(&data("zds", request));
        assert!(request.is_ok_and(|request| request.payload.is_some()));
    }
    let entry = serde_json::Map::from_iter([("type".to_owned(), install::PLUGIN.into())]);
    for conf in ["list", "list-with-us", "versions"] {
        assert!(install::chained("x.conflist", &data("conflist", conf), &entry).is_ok(), "{conf}");
    }
    for conf in ["single", "multus"] {
        assert!(install::chained("x.conf", &data("conflist", conf), &entry).is_ok(), "{conf}");
    }
    for config in ["add", "no-result", "gc", "gc-null"] {
        assert!(redirect_cni::Config::parse(&data("cni_config", config)).is_ok(), "{config}");
    }
    for result in ["dual", "old", "no-interfaces", "egress-only-interface"] {
        let result = serde_json::from_slice(&data("cni_result", result)).expect("JSON");
        assert!(redirect_cni::addresses(&result).is_ok(), "{result}");
    }
    for packet in ["v4-syn", "v4-options", "v6-syn", "v6-extensions", "v6-atomic-fragment", "vlan", "qinq"] {
        assert!(redirect_fuzz::is_tcp(&data("packet", packet)), "{packet}");
    }
}

#[test]
fn the_workflow_runs_every_target() {
    let names = TARGETS.map(|(name, _)| name).join(", ");
    assert!(include_str!("../../.github/workflows/fuzz.yml").contains(&format!("target: [{names}]")));
}
