//! The runtime has two threads, so slow work must run elsewhere. The body of an `async` function calls no blocking function of
//! the file system, of processes or of threads, except in closures that it passes on (`spawn_blocking`, the datapath's thread).

use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Expr, ExprAsync, ExprCall, ExprClosure, ImplItemFn, ItemFn, ItemMod};

/// Blocking modules and functions, by the ends of their paths.
const BLOCKING: [&[&str]; 5] =
    [&["fs", "*"], &["File", "open"], &["Command", "new"], &["thread", "sleep"], &["NetNs", "run"]];

#[derive(Default)]
struct Calls {
    in_async: bool,
    found: Vec<String>,
}

impl Calls {
    fn within(&mut self, in_async: bool, visit: impl FnOnce(&mut Self)) {
        let outside = std::mem::replace(&mut self.in_async, in_async);
        visit(self);
        self.in_async = outside;
    }
}

impl<'ast> Visit<'ast> for Calls {
    fn visit_item_fn(&mut self, function: &'ast ItemFn) {
        self.within(function.sig.asyncness.is_some(), |calls| visit::visit_item_fn(calls, function));
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        self.within(function.sig.asyncness.is_some(), |calls| visit::visit_impl_item_fn(calls, function));
    }

    fn visit_expr_async(&mut self, block: &'ast ExprAsync) {
        self.within(true, |calls| visit::visit_expr_async(calls, block));
    }

    fn visit_expr_closure(&mut self, closure: &'ast ExprClosure) {
        self.within(false, |calls| visit::visit_expr_closure(calls, closure));
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        if module.ident != "tests" {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_expr_call(&mut self, call: &'ast ExprCall) {
        if let Expr::Path(path) = &*call.func
            && self.in_async
        {
            let names: Vec<_> = path.path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            let blocks = |end: &&[&str]| {
                let Some(start) = names.len().checked_sub(end.len()) else { return false };
                names[start..].iter().zip(end.iter()).all(|(name, end)| *end == "*" || name == end)
            };
            // tokio's are asynchronous.
            if names[0] != "tokio" && BLOCKING.iter().any(blocks) {
                self.found.push(names.join("::"));
            }
        }
        visit::visit_expr_call(self, call);
    }
}

fn calls(text: &str) -> Vec<String> {
    let mut calls = Calls::default();
    calls.visit_file(&syn::parse_file(text).expect("Rust"));
    calls.found
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry")) {
        let path = entry.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "tests") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
}

#[test]
fn no_async_body_blocks() {
    let user = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crates");
    let mut found = Vec::new();
    for program in ["agent", "zds", "protocol", "proxy"] {
        sources(&user.join(program).join("src"), &mut found);
    }
    assert!(found.len() > 50, "{found:?}");
    let blocking: Vec<_> = found
        .iter()
        .map(|path| (path, calls(&fs::read_to_string(path).expect("a source"))))
        .filter(|(_, calls)| !calls.is_empty())
        .collect();
    assert!(blocking.is_empty(), "{blocking:#?}");
}

#[test]
fn bodies_that_block_are_found() {
    for (text, count) in [
        ("async fn a() { std::fs::read(path); }", 1),
        ("impl A { async fn a() { loop { fs::read(path); } } }", 1),
        ("fn a() { spawn(async move { std::thread::sleep(long) }) }", 1),
        ("async fn a() { Command::new(program).output(); }", 1),
        ("fn a() { fs::read(path); }", 0),
        ("async fn a() { spawn_blocking(move || fs::read(path)).await; }", 0),
        ("async fn a() { tokio::fs::read(path).await; }", 0),
        ("mod tests { async fn a() { fs::read(path); } }", 0),
    ] {
        assert_eq!(calls(text).len(), count, "{text}");
    }
}
