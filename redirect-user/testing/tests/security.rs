//! Every test that SECURITY.md names exists.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(directory: &Path, text: &mut String) {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(&path).expect("a source"));
        }
    }
}

/// The tests in a row's last column; `*` is a wildcard.
fn tests(row: &str) -> Vec<&str> {
    let last = row.trim_end_matches('|').rsplit('|').next().expect("a column");
    let quoted = last.split('`').skip(1).step_by(2);
    let plain = |c: char| c.is_ascii_alphanumeric() || "_:*".contains(c);
    let is_test =
        |text: &&str| text.chars().all(plain) && (text.contains("::") || text.matches('_').count() > 2);
    quoted.filter(is_test).collect()
}

/// Whether a source has it: as a function, or in the name of a trial.
fn is_there(test: &str, sources: &str) -> bool {
    let names = test.split("::").filter(|name| !name.is_empty()).map(|name| name.trim_end_matches('*'));
    // A group's name is a module's, or a prefix of a trial's.
    names.filter(|name| !name.is_empty()).all(|name| {
        let is_word = |(at, _): (usize, &str)| {
            let before = sources[..at].chars().next_back();
            let after = sources[at + name.len()..].chars().next();
            let ends = test.contains(&format!("{name}*")) || !after.is_some_and(is_of_a_name);
            !before.is_some_and(is_of_a_name) && ends
        };
        sources.match_indices(name).any(is_word)
    })
}

fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

#[test]
fn the_tests_that_it_names_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut text = String::new();
    for directory in ["redirect-user", "tests", "redirect-ebpf/src"] {
        sources(&root.join(directory), &mut text);
    }
    let document = fs::read_to_string(root.join("SECURITY.md")).expect("SECURITY.md");
    let rows: Vec<&str> = document.lines().filter(|line| line.starts_with('|')).collect();
    let tests: Vec<&str> = rows.iter().flat_map(|row| tests(row)).collect();
    assert!(tests.len() > 40, "{tests:?}");
    let missing: Vec<_> = tests.into_iter().filter(|test| !is_there(test, &text)).collect();
    assert!(missing.is_empty(), "SECURITY.md names tests that are not there: {missing:?}");
    assert!(!is_there("metrics::no_such_test_as_this".replace("this", "that").as_str(), &text));
}

/// Each limit of what is read has a test.
#[test]
fn every_limit_has_a_test() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../SECURITY.md");
    let document = fs::read_to_string(path).expect("SECURITY.md");
    let (_, section) = document.split_once("## Limits of what is read").expect("the section");
    let rows = section.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| what |"));
    let mut count = 0;
    for row in rows {
        assert!(!tests(row).is_empty(), "no test: {row}");
        count += 1;
    }
    assert!(count > 10, "{count} rows");
}
