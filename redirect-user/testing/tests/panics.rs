//! A panic ends the program, see ARCHITECTURE.md: every program sets that up first, and no code expects to survive one.

use std::fs;
use std::path::{Path, PathBuf};

use syn::{Expr, File, Item, Stmt};

/// Code that would handle a panic of another thread.
const DEAD: [&str; 6] =
    ["PoisonError", "LockResult", "catch_unwind", "resume_unwind", "try_into_panic", "is_panic"];

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry")) {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all() -> Vec<PathBuf> {
    let user = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crates");
    let mut found = Vec::new();
    for entry in fs::read_dir(user).expect("the crates") {
        let source = entry.expect("an entry").path().join("src");
        // Shared test code runs in processes of its own.
        if source.is_dir() && !source.starts_with(env!("CARGO_MANIFEST_DIR")) {
            sources(&source, &mut found);
        }
    }
    found
}

/// Whether `main` first makes panics end the process.
fn aborts_first(file: &File) -> bool {
    let main = file.items.iter().find_map(|item| match item {
        Item::Fn(function) if function.sig.ident == "main" => Some(function),
        _ => None,
    });
    let Some(Stmt::Expr(Expr::Call(call), _)) = main.and_then(|main| main.block.stmts.first()) else {
        return false;
    };
    let Expr::Path(path) = &*call.func else { return false };
    let names: Vec<_> = path.path.segments.iter().map(|segment| segment.ident.to_string()).collect();
    names == ["redirect_protocol", "panics", "abort"]
}

#[test]
fn a_panic_ends_every_program() {
    let mains: Vec<_> = all().into_iter().filter(|path| path.ends_with("main.rs")).collect();
    assert_eq!(mains.len(), 2, "{mains:?}");
    for path in mains {
        let text = fs::read_to_string(&path).expect("a source");
        assert!(aborts_first(&syn::parse_file(&text).expect("Rust")), "{}", path.display());
    }
    for (text, wanted) in [
        ("fn main() { redirect_protocol::panics::abort(); other() }", true),
        ("fn main() { other(); redirect_protocol::panics::abort(); }", false),
        ("fn main() {}", false),
    ] {
        assert_eq!(aborts_first(&syn::parse_file(text).expect("Rust")), wanted, "{text}");
    }
}

#[test]
fn nothing_lives_on_after_a_panic() {
    for path in all() {
        let text = fs::read_to_string(&path).expect("a source");
        let found: Vec<_> = DEAD.iter().filter(|word| text.contains(**word)).collect();
        assert!(found.is_empty(), "{}: {found:?}", path.display());
    }
}
