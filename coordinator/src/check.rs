//! Examines the cluster and changes nothing: what `preflight` does, and every run before it begins.

use std::sync::Arc;

use flannel_migration_protocol::{Field, Network, keys};
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use crate::api::{Error, Result, read};
use crate::args::Options;
use crate::cluster::{Node, NodeFacts, Nodes};
use crate::names;
use crate::preflight::server::{self, Server};
use crate::preflight::{AGENTS_MISSING, Finding, Severity, Verdict, examine};
use crate::rights::{self, Right};
use crate::survey::{Survey, survey};

/// What a look at the cluster gave.
pub struct Checked {
    /// What was read; none where rights are lacking to read it.
    pub survey: Option<Survey>,
    /// Where the cluster stands.
    pub verdict: Verdict,
    /// All findings, the heaviest first.
    pub findings: Vec<Finding>,
}

/// Who this process is, for people.
const SELF: &str = "this process's account";

/// Looks before a run. `lacking`: rights that were lacking at the last look, all of them before the first one.
pub async fn before_run(
    client: &Client,
    options: &Options,
    nodes: &Nodes,
    lacking: &mut Vec<Right>,
) -> Result<Checked> {
    *lacking = rights::own_lacking(client, lacking).await?;
    let mut known = Server {
        lacking: lacking.iter().map(|right| (SELF.to_owned(), right.clone())).collect(),
        ..Server::default()
    };
    if lacking.is_empty() {
        known.refused = refused(client, &nodes.all()).await?;
    }
    examined(client, options, nodes, known).await
}

/// Looks for `preflight`: with fewer rights than a run has, and before the agents are there.
pub async fn preflight(client: &Client, options: &Options, nodes: &Nodes) -> Result<Vec<Finding>> {
    let own = rights::own_lacking(client, &rights::of_preflight()).await?;
    let mut lacking: Vec<(String, Right)> = own.into_iter().map(|right| (SELF.to_owned(), right)).collect();
    let agents = nodes.all().iter().any(|node| !node.view.state.is_absent());
    if agents {
        let account = format!("service account {}/{}", options.namespace, names::APP);
        let needed = rights::of_coordinator();
        match rights::accounts_lacking(client, &options.namespace, names::APP, &needed).await {
            Ok(theirs) => lacking.extend(theirs.into_iter().map(|right| (account.clone(), right))),
            // Not to be allowed to ask is among what this process lacks.
            Err(error) if error.is_forbidden() => {}
            Err(error) => return Err(error),
        }
    }
    let known = Server { lacking, ..Server::default() };
    let mut findings = examined(client, options, nodes, known).await?.findings;
    for finding in findings.iter_mut().filter(|finding| finding.reason == AGENTS_MISSING) {
        // Applying them is the next step, but what they see isn't checked.
        finding.severity = Severity::Warning;
        "it isn't there: settings, devices, plugins and addresses of the nodes are not checked"
            .clone_into(&mut finding.found);
        "To have them checked, apply the agents first, which change nothing by themselves: kubectl apply \
         -f manifests/agent-rights.yaml -f manifests/agent-policy.yaml -f manifests/agent.yaml"
            .clone_into(&mut finding.remedy);
    }
    findings.sort();
    Ok(findings)
}

async fn examined(client: &Client, options: &Options, nodes: &Nodes, known: Server) -> Result<Checked> {
    let (nodes, foreign) = (nodes.all(), nodes.foreign());
    match survey(client, options, &nodes, &foreign).await {
        Ok(mut survey) => {
            survey.server.lacking = known.lacking;
            survey.server.refused = known.refused;
            let (verdict, findings) = examine(&survey, &options.stated, options.policy.strategy, &nodes);
            Ok(Checked { survey: Some(survey), verdict, findings })
        }
        Err(error) if error.is_forbidden() && !known.lacking.is_empty() => {
            let mut findings = Vec::new();
            server::rules(&known, &mut findings);
            Ok(Checked { survey: None, verdict: Verdict::NotReady, findings })
        }
        Err(error) => Err(error),
    }
}

/// Tries the first write of a migration without effect; what was tried, and why it was refused.
async fn refused(client: &Client, nodes: &[Arc<NodeFacts>]) -> Result<Option<(String, String)>> {
    let Some(node) = nodes.iter().find(|node| matches!(node.view.network, Field::Absent)) else {
        return Ok(None);
    };
    let patch = json!({ "metadata": { "labels": { keys::NETWORK: Network::Flannel.as_str() } } });
    let params = PatchParams {
        dry_run: true,
        field_manager: Some(names::FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let api: Api<Node> = Api::all(client.clone());
    match read("try to label a node", api.patch(&node.name, &params, &Patch::Merge(&patch))).await {
        Ok(_) => Ok(None),
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(None),
        Err(Error::Call { source, .. }) if matches!(*source, kube::Error::Api(_)) => {
            Ok(Some((format!("Node {}", node.name), source.to_string())))
        }
        Err(error) => Err(error),
    }
}
