//! The command `status`: composes what a kubeconfig may read, and prints it once or whenever it changes.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Client;
use kube::api::Api;
use serde::Serialize;
use tokio::time::sleep;

use super::{Coordinator, Noted, Phase, Status, board, compose, text};
use crate::api::{self, found, read};
use crate::args::{Options, Output, Policy};
use crate::cluster::{NodeFacts, Nodes};
use crate::names;

/// How often a watched status is looked at anew.
const LOOK: Duration = Duration::from_secs(1);

/// Prints where the migration is; with `watch`, until it is complete.
pub async fn status(options: &Options, output: Output, watch: bool) -> api::Result<()> {
    let client = api::client().await?;
    let nodes = Nodes::watch(client.clone()).await?;
    let look = async || -> api::Result<Status> { look(&client, &nodes, options).await };
    if !watch {
        return print(&written(&look().await?, output, false)?);
    }
    let terminal = output == Output::Table && std::io::stdout().is_terminal();
    let bar = terminal.then(bar);
    let mut before: Option<Status> = None;
    loop {
        let status = look().await?;
        let over = status.phase == Phase::Complete;
        match &bar {
            Some(bar) => draw(bar, &status, over),
            None if output == Output::Table => {
                for line in text::changes(before.as_ref(), &status, Timestamp::now()) {
                    print(&line)?;
                }
            }
            None if before.as_ref() != Some(&status) => print(&written(&status, output, true)?)?,
            None => {}
        }
        if over {
            return Ok(());
        }
        before = Some(status);
        sleep(LOOK).await;
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
    if let Ok(style) = ProgressStyle::with_template("{msg}\n\n[{bar:40}] {percent}%") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn draw(bar: &ProgressBar, status: &Status, over: bool) {
    let width = usize::from(console::Term::stdout().size().1).max(20);
    let screen = text::screen(status, Timestamp::now());
    let lines: Vec<_> = screen.lines().map(|line| console::truncate_str(line, width, "…")).collect();
    let number = |count: usize| u64::try_from(count).unwrap_or(0);
    bar.set_length(number(status.progress.total));
    bar.set_position(number(status.progress.done));
    bar.set_message(lines.join("\n"));
    if over {
        bar.abandon();
    } else {
        bar.tick();
    }
}

/// For people, or for machines; in a stream one JSON object is one line, and YAML's documents are apart.
fn written(status: &Status, output: Output, stream: bool) -> api::Result<String> {
    match output {
        Output::Table => Ok(text::screen(status, Timestamp::now())),
        Output::Json if stream => serde_json::to_string(status).map_err(unexpected),
        Output::Yaml if stream => Ok(format!("---\n{}", document(status, output)?)),
        _ => document(status, output),
    }
}

/// A value for machines: YAML if that is wanted, otherwise JSON.
pub fn document<T: Serialize>(value: &T, output: Output) -> api::Result<String> {
    match output {
        Output::Yaml => {
            serde_saphyr::to_string(value).map(|text| text.trim_end().to_owned()).map_err(unexpected)
        }
        Output::Json | Output::Table => serde_json::to_string_pretty(value).map_err(unexpected),
    }
}

fn unexpected(error: impl std::error::Error) -> api::Error {
    api::Error::Unexpected { what: "write it for machines".to_owned(), why: api::chain(&error) }
}

/// A reader that has gone away isn't an error worth a word, but there is nobody to go on for.
fn print(text: &str) -> api::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| api::Error::Unexpected {
        what: "print the status".to_owned(),
        why: error.to_string(),
    })
}

async fn look(client: &Client, nodes: &Nodes, options: &Options) -> api::Result<Status> {
    let kept = board::kept(client, &options.namespace).await?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), &options.namespace);
    let lease = found(read("read the leadership's Lease", leases.get(names::LEASE)).await)?;
    let all = nodes.all();
    let noted = noted(kept.as_ref(), lease, &all);
    let policy = policy(&options.policy, &noted);
    Ok(compose(&all, None, &noted, &policy, Timestamp::now()))
}

/// What the coordinator left, with what the Lease and the nodes know better.
fn noted(kept: Option<&Status>, lease: Option<Lease>, nodes: &[Arc<NodeFacts>]) -> Noted {
    let mut noted = kept.map(Noted::from).unwrap_or_default();
    let spec = lease.and_then(|lease| lease.spec).unwrap_or_default();
    let version = |identity: &str| match &noted.coordinator {
        Some(known) if known.identity == identity => known.version.clone(),
        _ => String::new(),
    };
    noted.coordinator = spec.holder_identity.filter(|identity| !identity.is_empty()).map(|identity| {
        // The API's types are of an older jiff.
        let renewed =
            spec.renew_time.and_then(|time| Timestamp::from_nanosecond(time.0.as_nanosecond()).ok());
        Coordinator { version: version(&identity), identity, renewed }
    });
    if noted.phase == Phase::NotStarted {
        let begun = nodes.iter().any(|node| !node.view.network.is_absent());
        let all_migrated = !nodes.is_empty() && nodes.iter().all(|node| node.migrated);
        noted.phase = match (begun, all_migrated) {
            (true, _) => Phase::Roll,
            (false, true) => Phase::Complete,
            (false, false) => Phase::NotStarted,
        };
    }
    noted
}

/// What the coordinator works by, as far as it has said so.
fn policy(own: &Policy, noted: &Noted) -> Policy {
    let mut policy = own.clone();
    if let Some(said) = &noted.policy {
        policy.strategy = said.strategy.parse().unwrap_or(policy.strategy);
        policy.max_unavailable = said.max_unavailable.parse().unwrap_or(policy.max_unavailable);
        policy.max_failures = said.max_failures;
        policy.drain_timeout = Duration::from_secs(said.drain_timeout_seconds);
        policy.node_budget = Duration::from_secs(said.node_budget_seconds);
    }
    policy
}

#[cfg(test)]
#[path = "show_tests.rs"]
mod tests;
