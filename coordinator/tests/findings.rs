//! The findings that the README lists are those that the code makes.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test ends by panicking"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::Regex;

/// Reason and weight.
type Findings = BTreeMap<String, String>;

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if !path.to_string_lossy().ends_with("_tests.rs") {
            found.push(path);
        }
    }
}

fn made() -> Findings {
    let call = Regex::new(r#"Finding::(fatal|blocking|holds_node|warning)\(\s*"([A-Za-z0-9]+)""#).unwrap();
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let mut findings = Findings::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for found in call.captures_iter(&text) {
            let (weight, reason) = (found[1].replace('_', "-"), found[2].to_owned());
            let known = findings.entry(reason.clone()).or_insert_with(|| weight.clone());
            assert_eq!(*known, weight, "{reason} weighs differently in {}", file.display());
        }
        let calls = text.matches("Finding::fatal(").count() + text.matches("Finding::blocking(").count();
        let named =
            call.captures_iter(&text).filter(|found| ["fatal", "blocking"].contains(&&found[1])).count();
        assert_eq!(calls, named, "{}: a finding's reason isn't written where it is made", file.display());
    }
    findings
}

#[test]
fn the_readme_lists_exactly_the_findings_that_there_are() {
    let listed: Findings = include_str!("../../README.md")
        .split("\n## Findings\n")
        .nth(1)
        .expect("the README has a section Findings")
        .split("\n## ")
        .next()
        .unwrap()
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split('|').map(|cell| cell.trim().trim_matches('`'));
            Some((cells.next()?.to_owned(), cells.next()?.to_owned()))
        })
        .collect();
    assert_eq!(listed, made());
}
