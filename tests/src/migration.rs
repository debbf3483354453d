//! A migration on a test bed: started as users start it, watched, and held to what it promises.

pub mod checks;
pub mod footprint;
pub mod pods;
mod run;

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

pub use run::{Change, NodeTimes, Outcome, PATIENCE, Request, run, workloads};

use crate::bed::{Bed, flannel::documents};

/// The label that moves the DaemonSets' pods.
pub const NETWORK_LABEL: &str = "projectcalico.org/node-network-during-migration";
/// The agent's label.
pub const STATE_LABEL: &str = "flannel-migration/state";
/// The coordinator's label: a node is changing over while it is there.
pub const LEASE_LABEL: &str = "flannel-migration/lease";
/// The administrator's label: the node isn't started.
pub const PAUSE_LABEL: &str = "flannel-migration/pause";

/// How the coordinator's Job stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Not over.
    Running,
    /// `1/1`.
    Complete,
    /// Over without success; why.
    Failed(String),
}

/// Applies the manifests as users do, with these environment variables of the coordinator set.
pub fn apply(bed: &Bed, environment: &[(&str, &str)]) -> Result<()> {
    apply_with(bed, environment, |_| {})
}

/// Like [`apply`], with the Job changed by `edit` before.
pub fn apply_with(bed: &Bed, environment: &[(&str, &str)], edit: impl FnOnce(&mut Value)) -> Result<()> {
    let mut objects = manifests()?;
    let job =
        objects.iter_mut().find(|object| object.get("kind") == Some(&json!("Job"))).context("no Job")?;
    edit(job);
    let variables = job
        .pointer_mut("/spec/template/spec/containers/0/env")
        .and_then(Value::as_array_mut)
        .context("the Job's container has no environment")?;
    for (name, value) in environment {
        variables.retain(|variable| variable.get("name") != Some(&json!(name)));
        variables.push(json!({ "name": name, "value": value }));
    }
    bed.apply(&objects)
}

/// Deletes what [`apply`] applied, and waits until it is gone.
pub fn delete(bed: &Bed) -> Result<()> {
    let path = rendered()?;
    let path = path.to_str().context("the checkout's path is no text")?;
    bed.kubectl(&["delete", "--ignore-not-found", "--wait", "-f", path]).map(drop)
}

/// The coordinator's Job now.
pub fn job(bed: &Bed) -> Result<Job> {
    let job = bed.get(&["-n", "kube-system", "job", "flannel-migration"])?;
    let conditions = job.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let condition = |kind: &str| {
        conditions
            .iter()
            .find(|c| c.get("type") == Some(&json!(kind)) && c.get("status") == Some(&json!("True")))
    };
    if condition("Complete").is_some() {
        return Ok(Job::Complete);
    }
    Ok(match condition("Failed") {
        Some(failed) => Job::Failed(failed.to_string()),
        None => Job::Running,
    })
}

/// What the coordinator logged, of all its pods that are still there.
pub fn coordinator_log(bed: &Bed) -> Result<String> {
    let selector = "k8s-app=flannel-migration-controller";
    bed.kubectl(&["-n", "kube-system", "logs", "-l", selector, "--tail=-1", "--ignore-errors"])
}

/// What the agent on `node` logged.
pub fn agent_log(bed: &Bed, node: &str) -> Result<String> {
    let field = format!("spec.nodeName={node}");
    let selector = "k8s-app=flannel-migration-agent";
    let pods = bed.get(&["-n", "kube-system", "pods", "-l", selector, "--field-selector", &field])?;
    let Some(name) = pods.pointer("/items/0/metadata/name").and_then(Value::as_str) else {
        bail!("no agent on {node}");
    };
    bed.kubectl(&["-n", "kube-system", "logs", name, "--tail=-1"])
}

/// `calicoctl args...` against the test bed.
pub fn calicoctl(bed: &Bed, args: &[&str]) -> Result<String> {
    let mut command = crate::run::command("env", &["DATASTORE_TYPE=kubernetes"]);
    command
        .env("KUBECONFIG", bed.plan.kubeconfig())
        .arg(bed.parts.program("calico", "calicoctl")?)
        .args(args);
    crate::run::output(&mut command)
}

fn manifests() -> Result<Vec<Value>> {
    let path = rendered()?;
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
    let objects = documents(&text)?;
    ensure!(!objects.is_empty(), "{} is empty", path.display());
    Ok(objects)
}

fn rendered() -> Result<std::path::PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests have no workspace")?;
    Ok(workspace.join("manifests/migration-job.yaml"))
}
