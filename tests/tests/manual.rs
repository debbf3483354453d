//! The manual says what the code says.

#![allow(clippy::panic, clippy::unwrap_used, reason = "all of it is tests")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// `CamelCase` in the code that is no reason: names of Kubernetes, Calico, flannel and CNI, and of the kubelet's own reasons.
const NO_REASONS: &[&str] = &[
    "AlwaysAllow",
    "BlockAffinity",
    "ClusterRole",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ConfigMap",
    "DaemonSet",
    "DoesNotExist",
    "ErrImageNeverPull",
    "ErrImagePull",
    "FelixConfiguration",
    "IPAMBlock",
    "IPAMHandle",
    "IPPool",
    "IPv4",
    "IPv6",
    "IfNotPresent",
    "ImageInspectError",
    "ImagePullBackOff",
    "InternalIP",
    "InvalidImageName",
    "MigrateNetwork",
    "NetworkMigrated",
    "NoDetour",
    "NoSchedule",
    "NotIn",
    "OnDelete",
    "PreferNoSchedule",
    "RegistryUnavailable",
    "RollingUpdate",
    "RunContainerError",
    "ServiceAccount",
    "StartError",
    "VtepMAC",
];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn files(directory: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
}

/// The product's code, without its tests.
fn code() -> String {
    let mut found = Vec::new();
    for part in ["coordinator/src", "agent/src", "protocol/src"] {
        files(&source().join(part), ".rs", &mut found);
    }
    let texts = found.iter().filter(|path| !path.to_string_lossy().contains("_tests")).map(|path| {
        let text = fs::read_to_string(path).unwrap();
        text.split("\n#[cfg(test)]\n").next().unwrap_or_default().to_owned()
    });
    texts.collect::<Vec<_>>().join("\n")
}

fn is_camel_case(word: &str) -> bool {
    let humps = word.chars().filter(char::is_ascii_uppercase).count();
    word.starts_with(|first: char| first.is_ascii_uppercase())
        && word.chars().all(|letter| letter.is_ascii_alphanumeric())
        && word.chars().any(|letter| letter.is_ascii_lowercase())
        && humps > 1
}

fn manual() -> String {
    let mut pages = vec![source().join("README.md")];
    files(&source().join("docs"), ".md", &mut pages);
    pages.iter().map(|page| fs::read_to_string(page).unwrap()).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_reason_of_the_code_is_in_the_manual() {
    let (code, manual) = (code(), manual());
    let reasons: BTreeSet<&str> =
        code.split('"').filter(|word| is_camel_case(word) && !NO_REASONS.contains(word)).collect();
    assert!(reasons.contains("RpFilterNotStrict") && reasons.len() > 50, "{reasons:?}");
    let missing: Vec<&&str> =
        reasons.iter().filter(|reason| !manual.contains(&format!("`{reason}`"))).collect();
    assert!(missing.is_empty(), "describe them in docs/reasons.md: {missing:?}");
}

#[test]
fn every_reason_of_the_manual_is_in_the_code() {
    let (code, manual) = (code(), manual());
    let rows = manual.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let gone: Vec<&str> = rows
        .filter(|word| is_camel_case(word))
        .filter(|word| !code.contains(&format!("\"{word}\"")))
        .collect();
    assert!(gone.is_empty(), "no such reason in the code: {gone:?}");
    let wrong: Vec<&&str> = NO_REASONS.iter().filter(|word| !code.contains(&format!("\"{word}\""))).collect();
    assert!(wrong.is_empty(), "not in the code any more: {wrong:?}");
}
