//! What is wrong with the API server, our rights there, and with others who do the same work.

use std::collections::BTreeMap;

use super::Finding;
use crate::rights::Right;

/// The first Kubernetes in which `ValidatingAdmissionPolicy` is stable: such policies bind the agents to their own nodes.
const OLDEST: (u32, u32) = (1, 30);

/// What was learned about the API server.
#[derive(Clone, Debug, Default)]
pub struct Server {
    /// Major and minor version; none when it can't be read.
    pub version: Option<(u32, u32)>,
    /// Who lacks which rights.
    pub lacking: Vec<(String, Right)>,
    /// Something that must be written, and why that was refused when it was tried without effect.
    pub refused: Option<(String, String)>,
    /// Jobs that run Calico's own migration.
    pub controllers: Vec<String>,
}

/// About all that.
pub fn rules(server: &Server, findings: &mut Vec<Finding>) {
    if let Some((major, minor)) = server.version.filter(|version| *version < OLDEST) {
        findings.push(Finding::fatal(
            "ApiServerTooOld",
            "API server",
            format!("Kubernetes {major}.{minor}"),
            format!("Update the cluster to {}.{} or later first", OLDEST.0, OLDEST.1),
        ));
    }
    let mut lacking: BTreeMap<(&str, String), Vec<&str>> = BTreeMap::new();
    for (account, right) in &server.lacking {
        lacking.entry((account, right.on())).or_default().push(&right.verb);
    }
    for ((account, on), verbs) in lacking {
        findings.push(Finding::blocking(
            "RightMissing",
            account,
            format!("it may not {} {on}", verbs.join(", ")),
            "Apply the manifests again: kubectl apply -k manifests (and -k manifests/preflight)",
        ));
    }
    if let Some((what, why)) = &server.refused {
        findings.push(Finding::blocking(
            "AdmissionRefuses",
            what,
            format!("a trial write was refused: {why}"),
            "Let the webhook or policy that refused it allow it",
        ));
    }
    for job in &server.controllers {
        findings.push(Finding::fatal(
            "AnotherController",
            format!("Job {job}"),
            "it runs Calico's own flannel migration, which drains and labels the same nodes",
            format!("Delete it: kubectl -n {} delete job {}", split(job).0, split(job).1),
        ));
    }
}

fn split(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or(("kube-system", name))
}
