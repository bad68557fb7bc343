//! Promise: `src/` has the layers of `docs/architecture.md`. No import points upwards, none is part of a circle, and unsafe code
//! is only where the page says.
//!
//! Imports are the paths in the text, in `use` declarations and elsewhere: `crate::…`, `self::…`, `super::…`, and those that begin
//! with a module of the file's own. A re-exported name (`pub use`) counts as an import of the file that it is from. The re-export
//! itself is no import. Tests inside `src/` may import anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A file of `src/`, with its module path.
struct Module {
    /// As in `kernel/decode.rs`.
    file: String,
    /// As in `["kernel", "decode"]`; empty for the crate's root.
    path: Vec<String>,
    /// Without comments, strings and tests.
    code: String,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn modules() -> Vec<Module> {
    let mut files = Vec::new();
    list(&root().join("src"), &mut files);
    let module = |file: PathBuf| {
        let name = file.strip_prefix(root().join("src")).unwrap().to_str().unwrap().replace('\\', "/");
        let path = name.trim_end_matches(".rs").split('/').map(String::from).collect::<Vec<_>>();
        let path = if path == ["lib"] { Vec::new() } else { path };
        Module { path, code: code_of(&fs::read_to_string(&file).unwrap()), file: name }
    };
    let is_test =
        |file: &PathBuf| file.components().any(|part| matches!(part.as_os_str().to_str(), Some("tests" | "tests.rs")));
    files.into_iter().filter(|file| !is_test(file)).map(module).collect()
}

fn list(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            list(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
}

/// The text without comments, string literals and a test module at the end.
fn code_of(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let mut code = String::new();
    for line in text.lines() {
        let line = line.split("//").next().unwrap_or_default();
        let mut in_string = false;
        code.extend(line.chars().filter(|&c| {
            in_string ^= c == '"';
            !in_string && c != '"'
        }));
        code.push('\n');
    }
    code
}

/// Every path in `code`, braces expanded.
fn paths(code: &str) -> Vec<Vec<String>> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    for (start, _) in code.match_indices("::") {
        let before = &code[..start];
        let word_start = before.rfind(|c| !is_word(c)).map_or(0, |at| at + 1);
        let first = &before[word_start..];
        // (`$crate` is in a macro: the path belongs to where that is used.)
        if !first.is_empty() && !before[..word_start].ends_with("::") && !before[..word_start].ends_with('$') {
            expand(&code[start + 2..], vec![first.to_string()], &mut found);
        }
    }
    found
}

/// Adds the paths that `rest` continues `path` with.
fn expand(rest: &str, path: Vec<String>, found: &mut Vec<Vec<String>>) {
    let rest = rest.trim_start();
    if let Some(list) = rest.strip_prefix('{') {
        let (mut depth, mut start) = (0, 0);
        for (at, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                ',' if depth == 0 => {
                    expand(&list[start..at], path.clone(), found);
                    start = at + 1;
                }
                '}' if depth == 0 => {
                    expand(&list[start..at], path, found);
                    return;
                }
                '}' => depth -= 1,
                _ => {}
            }
        }
        return;
    }
    let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
    if end == 0 {
        return found.push(path);
    }
    let path = path.into_iter().chain([rest[..end].to_string()]).collect::<Vec<_>>();
    match rest[end..].strip_prefix("::") {
        Some(more) => expand(more, path, found),
        None => found.push(path),
    }
}

/// The text without its re-exports, and these.
fn split_reexports(code: &str) -> (String, String) {
    let (mut own, mut reexports) = (String::new(), String::new());
    for statement in code.split_inclusive(';') {
        let is_reexport = statement
            .rfind("use ")
            .is_some_and(|at| statement[..at].trim_end().ends_with("pub") || statement[..at].trim_end().ends_with(')'));
        if is_reexport { &mut reexports } else { &mut own }.push_str(statement);
    }
    (own, reexports)
}

type Files = BTreeMap<Vec<String>, String>;

/// The module that a path names, with what follows it; `None` if it begins with anything but a module.
fn resolve(path: &[String], module: &[String], files: &Files) -> Option<(Vec<String>, Option<String>)> {
    let mut base = if path[0] == "crate" { Vec::new() } else { module.to_vec() };
    let mut rest = &path[1..];
    if !matches!(path[0].as_str(), "crate" | "super" | "self") {
        rest = path;
        let child = base.iter().chain(&path[..1]).cloned().collect::<Vec<_>>();
        files.get(&child)?;
    }
    if path[0] == "super" {
        base.pop();
        while rest.first().is_some_and(|part| part == "super") {
            base.pop();
            rest = &rest[1..];
        }
    }
    (0..=rest.len()).rev().find_map(|n| {
        let candidate = base.iter().chain(&rest[..n]).cloned().collect::<Vec<_>>();
        files.contains_key(&candidate).then(|| (candidate, rest.get(n).cloned()))
    })
}

/// What each module re-exports: the name, and the module that it is from.
fn reexports(modules: &[Module], files: &Files) -> BTreeMap<(Vec<String>, String), Vec<String>> {
    let mut from = BTreeMap::new();
    for module in modules {
        for path in paths(&split_reexports(&module.code).1) {
            if let Some((origin, Some(name))) = resolve(&path, &module.path, files) {
                from.insert((module.path.clone(), name), origin);
            }
        }
    }
    from
}

/// The files that a module imports.
fn imports(
    module: &Module,
    files: &Files,
    reexports: &BTreeMap<(Vec<String>, String), Vec<String>>,
) -> BTreeSet<String> {
    let mut imports = BTreeSet::new();
    for path in paths(&split_reexports(&module.code).0) {
        let Some((mut origin, name)) = resolve(&path, &module.path, files) else { continue };
        if let Some(name) = name {
            while let Some(further) = reexports.get(&(origin.clone(), name.clone())) {
                origin = further.clone();
            }
        }
        imports.extend(files.get(&origin).filter(|file| *file != &module.file).cloned());
    }
    imports
}

/// The layers that the page lists, from the top: each a name and its files and folders.
fn layers() -> Vec<(String, Vec<String>)> {
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let list = page.split("<!-- layers -->").nth(1).expect("the layers in docs/architecture.md");
    let lines = list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("```"));
    lines
        .map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap_or_default().to_string();
            let is_place = |word: &&str| word.ends_with(".rs") || word.ends_with('/');
            (name, words.take_while(is_place).map(String::from).collect())
        })
        .collect()
}

/// The places that may hold unsafe code.
fn unsafe_places() -> Vec<String> {
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let list = page.split("<!-- unsafe -->").nth(1).expect("the places of unsafe code in docs/architecture.md");
    list.split('`').skip(1).step_by(2).map(String::from).collect()
}

fn is_in(file: &str, place: &str) -> bool {
    file == place || place.ends_with('/') && file.starts_with(place)
}

/// The layer of a file, counted from the top: the longest place that it is in decides.
fn layer_of(file: &str, layers: &[(String, Vec<String>)]) -> Option<usize> {
    let places =
        layers.iter().enumerate().flat_map(|(layer, (_, places))| places.iter().map(move |place| (layer, place)));
    places.filter(|(_, place)| is_in(file, place)).max_by_key(|(_, place)| place.len()).map(|(layer, _)| layer)
}

#[test]
fn every_file_is_in_a_layer_and_every_place_exists() {
    let (modules, layers) = (modules(), layers());
    assert!(layers.len() >= 6 && modules.len() > 40, "{layers:?}");
    for module in modules.iter().filter(|module| module.file != "lib.rs") {
        assert!(layer_of(&module.file, &layers).is_some(), "{} is in no layer of docs/architecture.md", module.file);
    }
    for place in layers.iter().flat_map(|(_, places)| places) {
        assert!(
            modules.iter().any(|module| is_in(&module.file, place)),
            "no file is in {place} of docs/architecture.md"
        );
    }
}

#[test]
fn no_import_points_upwards_or_in_a_circle() {
    let (modules, layers) = (modules(), layers());
    let files: BTreeMap<_, _> = modules.iter().map(|module| (module.path.clone(), module.file.clone())).collect();
    let reexports = reexports(&modules, &files);
    let mut wrong = Vec::new();
    let mut graph = BTreeMap::new();
    for module in modules.iter().filter(|module| module.file != "lib.rs") {
        let own = layer_of(&module.file, &layers).unwrap();
        let imports = imports(module, &files, &reexports);
        for import in &imports {
            let theirs = layer_of(import, &layers).unwrap_or_default();
            if theirs < own {
                let (own, theirs) = (&layers[own].0, &layers[theirs].0);
                wrong.push(format!("{} ({own}) imports {import} ({theirs}), which is above it", module.file));
            }
        }
        graph.insert(module.file.clone(), imports);
    }
    for file in graph.keys() {
        if let Some(circle) = circle_from(file, &graph) {
            wrong.push(format!("a circle: {}", circle.join(" -> ")));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// A shortest way from a file back to itself.
fn circle_from(file: &str, graph: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    let mut ways = vec![vec![file.to_string()]];
    let mut seen = BTreeSet::new();
    let mut next = 0;
    while let Some(way) = ways.get(next).cloned() {
        next += 1;
        for import in graph.get(way.last()?).into_iter().flatten() {
            if import == file {
                return Some(way.into_iter().chain([import.clone()]).collect());
            }
            if seen.insert(import.clone()) {
                ways.push(way.iter().cloned().chain([import.clone()]).collect());
            }
        }
    }
    None
}

#[test]
fn unsafe_code_is_where_the_page_says() {
    let places = unsafe_places();
    for module in modules() {
        let words = module.code.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        let has_unsafe = words.into_iter().any(|word| word == "unsafe");
        let may = places.iter().any(|place| is_in(&module.file, place));
        assert!(may || !has_unsafe, "{} has unsafe code; docs/architecture.md names {places:?}", module.file);
    }
}

/// The reader of imports itself.
#[test]
fn paths_are_found() {
    let code = code_of(
        "use crate::a::{b::C, d};\npub use own::H;\nlet x = super::e::f(crate::G); // crate::no\nlet s = \"crate::no\";",
    );
    let (own, reexports) = split_reexports(&code);
    assert!(reexports.contains("own::H") && !own.contains("own::H") && own.contains("super::e"), "{own}");
    let found: BTreeSet<String> = paths(&code).into_iter().map(|path| path.join("::")).collect();
    for path in ["crate::a::b::C", "crate::a::d", "super::e::f", "crate::G", "own::H"] {
        assert!(found.contains(path), "{path} of {found:?}");
    }
    assert!(!found.iter().any(|path| path.contains("no")), "{found:?}");
    let circle = BTreeMap::from([
        ("a".to_string(), BTreeSet::from(["b".to_string()])),
        ("b".to_string(), BTreeSet::from(["c".to_string()])),
        ("c".to_string(), BTreeSet::from(["a".to_string()])),
    ]);
    assert_eq!(circle_from("a", &circle).unwrap(), ["a", "b", "c", "a"]);
}
