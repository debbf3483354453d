//! All rules, in order, and where the cluster stands by them.

use std::sync::Arc;

use flannel_migration_protocol::Strategy;

use super::{Finding, calico, drain, flannel, nodes, server};
use crate::args::Stated;
use crate::cluster::NodeFacts;
use crate::settings::{self, Settings};
use crate::survey::{Survey, begun, calico_in_use};

/// Where the cluster stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It can be migrated, or goes on being migrated.
    Ready(Box<Settings>),
    /// It has been migrated: there is nothing to do.
    AlreadyMigrated,
    /// Every node is migrated and the finish was begun.
    Finishing,
    /// Something is in the way.
    NotReady,
}

/// Reason of the finding that the agents aren't applied yet; no trouble for who only checks.
pub const AGENTS_MISSING: &str = "AgentsMissing";

/// All findings, and where the cluster stands. `strategy` is that of nodes without one of their own.
#[must_use]
pub fn examine(
    survey: &Survey,
    stated: &Stated,
    strategy: Strategy,
    nodes: &[Arc<NodeFacts>],
) -> (Verdict, Vec<Finding>) {
    if survey.finishing.is_some() {
        return (Verdict::Finishing, Vec::new());
    }
    let mut findings = Vec::new();
    // One that can't be picked is told by the settings.
    match settings::flannel(stated, &survey.detected.flannel) {
        Ok(Some(flannel)) => {
            flannel::daemon(flannel, survey.addon_managed, &mut findings);
            drain::canal(flannel, nodes, strategy, &mut findings);
            let config = flannel::Config {
                conf: survey.detected.net_conf.as_ref(),
                error: survey.net_conf_error.as_deref(),
                forbidden: survey.net_conf_forbidden,
            };
            flannel::config(flannel, config, &mut findings);
        }
        Ok(None) => match without_flannel(survey, stated, nodes) {
            None => return (Verdict::AlreadyMigrated, Vec::new()),
            Some(finding) => findings.push(finding),
        },
        Err(_) => {}
    }
    server::rules(&survey.server, &mut findings);
    calico::definitions(&survey.datastore, &mut findings);
    if let Ok(Some(calico)) = settings::calico(stated, &survey.detected.calico)
        && !survey.detected.flannel.is_empty()
    {
        let template = survey.detected.template.as_deref();
        calico::daemon(calico, template, survey.calico_pods.0, &mut findings);
    }
    nodes::windows(&survey.windows, &mut findings);
    drain::rules(&survey.workloads, nodes, strategy, &mut findings);
    let told = survey.net_conf_error.is_some() || survey.net_conf_forbidden;
    let settings = settings::settle(stated, &survey.detected)
        .map_err(|more| {
            // Why the configuration isn't known is told already.
            findings.extend(more.into_iter().filter(|finding| !(told && finding.is_about_config())));
        })
        .ok();
    if let Some(settings) = &settings {
        nodes::all(settings, nodes, survey.agents, &mut findings);
        calico::contents(&survey.datastore, settings, nodes, calico_in_use(nodes), &mut findings);
    }
    if !survey.agents {
        findings.push(Finding::blocking(
            "AgentsMissing",
            format!("DaemonSet kube-system/{}", crate::names::AGENT),
            "it isn't there",
            "Apply it: kubectl apply -k manifests",
        ));
    }
    if nodes.is_empty() {
        findings.push(Finding::blocking("NoNodes", "Nodes", "there is no node that runs Linux", "Add nodes"));
    }
    findings.sort();
    findings.dedup();
    let stops = findings.iter().any(|finding| finding.severity.stops());
    match settings {
        Some(settings) if !stops => (Verdict::Ready(Box::new(settings)), findings),
        _ => (Verdict::NotReady, findings),
    }
}

/// What is in the way where no flannel is found; nothing if Calico has taken its place everywhere.
fn without_flannel(survey: &Survey, stated: &Stated, nodes: &[Arc<NodeFacts>]) -> Option<Finding> {
    match settings::calico(stated, &survey.detected.calico) {
        Ok(Some(calico)) if !calico.waits && !begun(nodes) => {
            let (desired, ready) = survey.calico_pods;
            let all = i32::try_from(nodes.len()).unwrap_or(i32::MAX);
            (desired < all || ready < desired).then(|| {
                Finding::blocking(
                    "CalicoNotEverywhere",
                    format!("DaemonSet {}", calico.daemon_set),
                    format!("no DaemonSet runs flanneld, and {ready} of {desired} pods of Calico are ready, on {all} nodes"),
                    "See to Calico's pods",
                )
            })
        }
        _ => {
            let annotated = nodes.iter().find(|node| node.in_flannels_network());
            let where_else = annotated.map_or_else(String::new, |node| {
                format!(
                    "; but node {} has flannel's annotations: it may run outside of pods there (k3s)",
                    node.name
                )
            });
            Some(Finding::fatal(
                "FlannelNotFound",
                "DaemonSets in all namespaces",
                format!("none runs flanneld, and Calico doesn't run everywhere in its place{where_else}"),
                "If flannel runs outside of pods (k3s), it can't be migrated by this version; else see that its DaemonSet is there",
            ))
        }
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
