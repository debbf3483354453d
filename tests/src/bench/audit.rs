//! What accounts asked of the API server, by its own audit log.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, BufReader, Seek as _, SeekFrom},
    path::PathBuf,
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::bed::Bed;

/// How often each was called, by `verb resource`.
pub type Calls = BTreeMap<String, u64>;

/// Prefix of the accounts that count: coordinator, agents, and Calico's own controller, whose account is named alike.
const ACCOUNTS: &str = "system:serviceaccount:kube-system:flannel-migration-";

/// How much has been logged, in bytes.
pub fn position(bed: &Bed) -> Result<u64> {
    let mut all = 0;
    for path in files(bed)? {
        all += fs::metadata(path)?.len();
    }
    Ok(all)
}

/// The calls since `from`, by account without the common prefix.
pub fn since(bed: &Bed, from: u64) -> Result<BTreeMap<String, Calls>> {
    let mut accounts: BTreeMap<String, Calls> = BTreeMap::new();
    let mut skip = from;
    for path in files(bed)? {
        let mut file = File::open(&path).with_context(|| format!("can't read {}", path.display()))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(skip.min(length)))?;
        skip = skip.saturating_sub(length);
        for line in BufReader::new(file).lines() {
            // The last line may be half written.
            let Ok(event) = serde_json::from_str::<Value>(&line?) else { continue };
            if let Some((account, call)) = read(&event) {
                *accounts.entry(account).or_default().entry(call).or_default() += 1;
            }
        }
    }
    Ok(accounts)
}

/// Rotated ones first, as they were written.
fn files(bed: &Bed) -> Result<Vec<PathBuf>> {
    let directory = bed.plan.directory().join("control");
    let mut files: Vec<PathBuf> = fs::read_dir(&directory)
        .with_context(|| format!("can't read {}", directory.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            name.starts_with("audit") && path.extension().is_some_and(|extension| extension == "log")
        })
        .collect();
    // `audit-<time>.log` sorts before `audit.log`.
    files.sort();
    Ok(files)
}

fn read(event: &Value) -> Option<(String, String)> {
    let account = event.pointer("/user/username")?.as_str()?.strip_prefix(ACCOUNTS)?;
    let verb = event.get("verb")?.as_str()?;
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let uri = text("/requestURI");
    let resource = text("/objectRef/resource");
    let resource = match text("/objectRef/subresource") {
        "" => resource.to_owned(),
        part => format!("{resource}/{part}"),
    };
    let trial = if uri.contains("dryRun=") { " (trial)" } else { "" };
    Some((account.to_owned(), format!("{verb} {resource}{trial}")))
}

/// Whether a call changes an object. Events are for people, trials and access reviews change nothing, an exec isn't an object.
#[must_use]
pub fn is_write(call: &str) -> bool {
    let Some((verb, resource)) = call.split_once(' ') else { return false };
    ["create", "update", "patch", "delete", "deletecollection"].contains(&verb)
        && resource != "events"
        && !resource.ends_with("reviews")
        && !resource.ends_with("/exec")
        && !resource.ends_with("(trial)")
}

/// Writes among the calls; leadership is told apart, for it grows with time and not with work.
#[must_use]
pub fn writes(calls: &Calls) -> u64 {
    calls
        .iter()
        .filter(|(call, _)| is_write(call) && !call.ends_with(" leases"))
        .map(|(_, count)| count)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_events_trials_and_reviews_are_no_writes() {
        let no = [
            "get nodes",
            "create events",
            "patch nodes (trial)",
            "create selfsubjectaccessreviews",
            "create pods/exec",
            "watch nodes",
        ];
        assert!(no.iter().all(|call| !is_write(call)));
        assert!(
            ["patch nodes", "create pods/eviction", "patch nodes/status"].iter().all(|call| is_write(call))
        );
    }

    #[test]
    fn a_call_is_counted_for_its_account_with_its_subresource() {
        let event = serde_json::json!({
            "user": { "username": "system:serviceaccount:kube-system:flannel-migration-agent" }, "verb": "patch",
            "requestURI": "/api/v1/nodes/n1/status", "objectRef": { "resource": "nodes", "subresource": "status" },
        });
        assert_eq!(read(&event), Some(("agent".to_owned(), "patch nodes/status".to_owned())));
        let other = serde_json::json!({ "user": { "username": "admin" }, "verb": "get" });
        assert_eq!(read(&other), None);
    }
}
