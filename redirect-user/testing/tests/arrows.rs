//! Dependencies between crates, and between the modules of a crate: they point downwards, without cycles.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, UseTree};

/// From top to bottom: a crate may use only those after it.
const CRATES: [&str; 9] = [
    "redirect-cli",
    "redirect-agent",
    "redirect-proxy",
    "redirect-cni",
    "redirect-datapath",
    "redirect-zds",
    "redirect-protocol",
    "redirect-linux",
    "redirect-ebpf",
];

/// Crates that another crate must not depend on, directly or transitively.
const WITHOUT: [(&str, &[&str]); 3] = [
    ("redirect-cni", &["aya", "kube", "redirect-linux", "tokio"]),
    ("redirect-agent", &["comfy-table", "crossterm", "ratatui", "redirect-proxy"]),
    ("redirect-protocol", &["aya", "netlink-packet-core", "rtnetlink", "tokio"]),
];

#[test]
fn arrows_between_crates_point_down() {
    let metadata = cargo(&["metadata", "--format-version=1", "--no-deps"]);
    let metadata: Value = serde_json::from_str(&metadata).expect("JSON");
    for package in metadata["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("a name");
        let Some(floor) = CRATES.iter().position(|known| *known == name) else { continue };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let other = dependency["name"].as_str().expect("a name");
            if dependency["kind"].is_null() && other.starts_with("redirect-") {
                let below = CRATES.iter().skip(floor + 1).any(|known| *known == other);
                assert!(below, "{name} uses {other}, which is not below it");
            }
        }
    }
}

#[test]
fn crates_are_built_without_what_they_must_not_know() {
    for (name, forbidden) in WITHOUT {
        let tree = cargo(&["tree", "--package", name, "--edges", "normal", "--prefix", "none"]);
        let used: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
        let found: Vec<_> = forbidden.iter().filter(|other| used.contains(*other)).collect();
        assert!(found.is_empty(), "{name} is built with {found:?}");
    }
}

#[test]
fn modules_of_a_crate_form_no_circle() {
    let user = root().join("redirect-user");
    let crates = fs::read_dir(&user).expect("the crates").map(|entry| entry.expect("an entry").path());
    for folder in crates.chain([root().join("redirect-ebpf")]) {
        let modules = Modules::of(&folder.join("src"));
        let circles = modules.circles();
        assert!(circles.is_empty(), "{}:\n{}", folder.display(), circles.join("\n"));
    }
}

#[test]
fn a_circle_is_found_wherever_it_is_closed() {
    let sources = |sources: &[(&str, &str)]| {
        let parsed = |(module, text): &(&str, &str)| {
            let path = module.split('/').filter(|name| !name.is_empty()).map(str::to_owned).collect();
            (path, syn::parse_file(text).expect("Rust"))
        };
        Modules(sources.iter().map(parsed).collect()).circles()
    };
    let root = ("", "mod a; mod b;");
    for closed in [
        "use crate::a::X;",
        "use super::{c, a::{X, Y}};",
        "fn f() { crate::a::x(); }",
        "fn f(_: super::a::X) {}",
    ] {
        assert_eq!(sources(&[root, ("a", "use crate::b;"), ("b", closed)]).len(), 1, "{closed}");
        assert_eq!(sources(&[root, ("a", ""), ("b", closed)]).len(), 0, "{closed}");
    }
    // Uses in tests do not count, nor does a module's use of its parent.
    let tested = "#[cfg(test)] mod tests { use crate::a::X; }";
    assert_eq!(sources(&[root, ("a", "use crate::b;"), ("b", tested)]).len(), 0);
    assert_eq!(sources(&[root, ("a", "mod c; use c::X;"), ("a/c", "use super::Y;")]).len(), 0);
    let deep = [root, ("a", ""), ("a/c", "use super::d::X;"), ("a/d", "use crate::a::c::Y;")];
    assert_eq!(sources(&deep).len(), 1);
}

/// The path of a module in its crate.
type Module = Vec<String>;

/// The modules of a crate, by file.
struct Modules(BTreeMap<Module, syn::File>);

impl Modules {
    /// The modules below a folder, except tests.
    fn of(folder: &Path) -> Self {
        let mut modules = BTreeMap::new();
        let mut folders = vec![folder.to_path_buf()];
        while let Some(current) = folders.pop() {
            for entry in fs::read_dir(&current).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let name = path.strip_prefix(folder).expect("below it").with_extension("");
                    let module: Module = match name.to_str() {
                        Some("lib" | "main") => Vec::new(),
                        _ => name.iter().map(|part| part.to_string_lossy().into_owned()).collect(),
                    };
                    if !module.iter().any(|part| part == "tests") {
                        let text = fs::read_to_string(&path).expect("a file");
                        modules.insert(module, syn::parse_file(&text).expect("Rust"));
                    }
                }
            }
        }
        Self(modules)
    }

    /// Descriptions of the cycles among the children of each module.
    fn circles(&self) -> Vec<String> {
        let mut arrows: BTreeMap<(Module, String), BTreeSet<String>> = BTreeMap::new();
        for (module, file) in &self.0 {
            let mut uses = Uses { module, found: BTreeSet::new() };
            uses.visit_file(file);
            for used in uses.found {
                let used = self.file_of(used);
                let shared = module.iter().zip(&used).take_while(|(own, other)| own == other).count();
                if let (Some(from), Some(to)) = (module.get(shared), used.get(shared)) {
                    let key = (module[..shared].to_vec(), from.clone());
                    arrows.entry(key).or_default().insert(to.clone());
                }
            }
        }
        let mut circles = BTreeSet::new();
        for (folder, from) in arrows.keys() {
            let mut reached = BTreeSet::new();
            let mut next = vec![from.clone()];
            while let Some(module) = next.pop() {
                for to in arrows.get(&(folder.clone(), module)).into_iter().flatten() {
                    if reached.insert(to.clone()) {
                        next.push(to.clone());
                    }
                }
            }
            if reached.contains(from) {
                let back = |to: &&String| {
                    let mut seen = BTreeSet::new();
                    let mut next = vec![(*to).clone()];
                    while let Some(module) = next.pop() {
                        if module == *from {
                            return true;
                        }
                        let arrows = arrows.get(&(folder.clone(), module)).into_iter().flatten();
                        next.extend(arrows.filter(|to| seen.insert((*to).clone())).cloned());
                    }
                    false
                };
                let circle: BTreeSet<_> = reached.iter().filter(back).cloned().collect();
                circles.insert((folder.clone(), circle));
            }
        }
        let in_words = |(folder, circle): &(Module, BTreeSet<String>)| {
            let names: Vec<_> = circle.iter().map(String::as_str).collect();
            format!("in crate::{}: {} use each other", folder.join("::"), names.join(", "))
        };
        circles.iter().map(in_words).collect()
    }

    /// The file that contains a path's item.
    fn file_of(&self, mut path: Module) -> Module {
        while !path.is_empty() && !self.0.contains_key(&path) {
            path.pop();
        }
        path
    }
}

/// Collects the paths by which a module refers to its own crate.
struct Uses<'a> {
    module: &'a Module,
    found: BTreeSet<Module>,
}

impl Uses<'_> {
    /// A path as written; `None` if it does not begin in this crate.
    fn add(&mut self, written: &[String]) {
        let mut rest = written;
        let mut path = match rest.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("self" | "super") => self.module.clone(),
            _ => return,
        };
        while let Some((first, others)) = rest.split_first().filter(|(first, _)| is_keyword(first)) {
            if first == "super" {
                path.pop();
            }
            rest = others;
        }
        path.extend(rest.iter().cloned());
        self.found.insert(path);
    }

    fn add_tree(&mut self, tree: &UseTree, before: &[String]) {
        let with = |name: &syn::Ident| before.iter().cloned().chain([name.to_string()]).collect::<Vec<_>>();
        match tree {
            UseTree::Path(path) => self.add_tree(&path.tree, &with(&path.ident)),
            UseTree::Name(name) => self.add(&with(&name.ident)),
            UseTree::Rename(rename) => self.add(&with(&rename.ident)),
            UseTree::Glob(_) => self.add(before),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_tree(tree, before)),
        }
    }
}

fn is_keyword(name: &str) -> bool {
    matches!(name, "crate" | "self" | "super")
}

impl<'ast> Visit<'ast> for Uses<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Mod(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            _ => &Vec::new(),
        };
        if !attributes.iter().any(is_for_tests) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.add_tree(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let written: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.add(&written);
        visit::visit_path(self, path);
    }
}

/// `#[cfg(test)]`
fn is_for_tests(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg") && attribute.parse_args::<syn::Ident>().is_ok_and(|what| what == "test")
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn cargo(arguments: &[&str]) -> String {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let output = cargo.current_dir(root()).args(arguments).arg("--locked").output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}
