//! A [`Status`] in words. Pure.

use std::fmt::Write as _;

use jiff::Timestamp;

use super::{NodeStatus, Phase, Status};

/// A table with a head line; columns as wide as their widest cell.
#[must_use]
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = head
        .iter()
        .enumerate()
        .map(|(column, title)| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
                .max(title.len())
        })
        .collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<_> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut head.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

/// The whole of it: what the cluster is at, the nodes, what is in the way.
#[must_use]
pub fn screen(status: &Status, now: Timestamp) -> String {
    let mut text = head(status, now);
    text.push_str("\n\n");
    let rows: Vec<Vec<String>> = status.nodes.iter().map(|node| row(node, now)).collect();
    let titles = ["NODE", "NETWORK", "STATE", "SINCE", "STRATEGY", "ADOPTED", "EVICTED", "REASON", "NOW"];
    text.push_str(&table(&titles, &rows));
    let block = |text: &mut String, title: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            let _ = write!(text, "\n\n{title}:\n  {}", lines.join("\n  "));
        }
    };
    let alarms =
        status.alarms.iter().map(|alarm| format!("{}: {}: {}", alarm.node, alarm.reason, alarm.message));
    block(&mut text, "a person is needed; no further node is started", alarms.collect());
    let failed = status.nodes.iter().filter(|node| node.retry_after.is_some());
    let failed = failed.map(|node| format!("{}: {}: {}", node.node, node.reason, node.message));
    block(&mut text, "not migrated yet", failed.collect());
    let in_the_way = |weight: &str| {
        let findings = status.findings.iter().filter(|finding| finding.severity == weight);
        findings
            .map(|finding| {
                format!("{}: {}: {}. {}", finding.reason, finding.object, finding.found, finding.remedy)
            })
            .collect::<Vec<_>>()
    };
    if matches!(status.phase, Phase::Preflight | Phase::Failed) {
        block(&mut text, "to be put right before it starts", in_the_way("fatal"));
        block(&mut text, "in the way; looked at again until it is gone", in_the_way("blocking"));
    }
    text
}

/// One line about the cluster, one about the coordinator.
fn head(status: &Status, now: Timestamp) -> String {
    let progress = &status.progress;
    let mut text = format!("phase {}: {} of {} nodes migrated", status.phase, progress.done, progress.total);
    if let Some(seconds) = progress.remaining_seconds.filter(|_| progress.done < progress.total) {
        let _ = write!(text, ", about {} to go", span(seconds));
    }
    if let (Some(started), Some(ended)) = (status.started, status.ended) {
        let _ = write!(text, ", took {}", age(started, ended));
    }
    if let Some(policy) = &status.policy {
        let _ = write!(text, "; strategy {}, {} at a time", policy.strategy, policy.max_unavailable);
    }
    if !status.message.is_empty() {
        let _ = write!(text, "\n{}", status.message);
    }
    text.push('\n');
    match &status.coordinator {
        Some(coordinator) => {
            let _ = write!(text, "coordinator {}", coordinator.identity);
            if !coordinator.version.is_empty() {
                let _ = write!(text, " (version {})", coordinator.version);
            }
            if let Some(renewed) = coordinator.renewed {
                let _ = write!(text, ", heard of {} ago", age(renewed, now));
            }
        }
        None if matches!(status.phase, Phase::NotStarted | Phase::Complete) => {
            text.push_str("no coordinator runs");
        }
        None => {
            text.push_str("NO COORDINATOR LEADS: see kubectl -n kube-system describe job flannel-migration");
        }
    }
    text
}

fn row(node: &NodeStatus, now: Timestamp) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
    let number = |value: Option<usize>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    let mut state = text(&node.state);
    for (is, word) in [(!node.ready, "not ready"), (node.cordoned, "cordoned"), (node.paused, "paused")] {
        if is {
            let _ = write!(state, ", {word}");
        }
    }
    vec![
        node.node.clone(),
        text(&node.network),
        state,
        node.since.map_or_else(|| "-".to_owned(), |since| age(since, now)),
        text(&node.strategy),
        number(node.adopted),
        number(node.evicted),
        if node.reason.is_empty() { "-".to_owned() } else { node.reason.clone() },
        doing(node, now),
    ]
}

/// What a node does or waits for.
fn doing(node: &NodeStatus, now: Timestamp) -> String {
    let step = if node.lease.is_some() { node.step.as_str() } else { "" };
    match (step, &node.waiting_for, node.retry_after) {
        (_, _, Some(at)) if at > now => format!("tried again in {}", age(now, at)),
        ("", Some(waiting), _) => format!("waits for {waiting}"),
        (step, _, _) => step.to_owned(),
    }
}

/// What changed, a line per node and one for the phase: for logs and pipes.
#[must_use]
pub fn changes(before: Option<&Status>, after: &Status, now: Timestamp) -> Vec<String> {
    let mut lines = Vec::new();
    let stamp = now.strftime("%H:%M:%S");
    let progress = after.progress;
    let moved = |old: &Status| {
        (old.phase, old.progress.done, &old.message) != (after.phase, progress.done, &after.message)
    };
    if before.is_none_or(moved) {
        let message = if after.message.is_empty() { String::new() } else { format!(": {}", after.message) };
        lines.push(format!(
            "{stamp} phase {}, {}/{} nodes{message}",
            after.phase, progress.done, progress.total
        ));
    }
    for node in &after.nodes {
        let told = |node: &NodeStatus| {
            let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
            let waiting =
                node.waiting_for.as_ref().map(|what| format!(", waits for {what}")).unwrap_or_default();
            let reason = if node.reason.is_empty() { String::new() } else { format!(" ({})", node.reason) };
            format!(
                "{}: network {}, state {}{reason}{waiting}",
                node.node,
                text(&node.network),
                text(&node.state)
            )
        };
        let old = before.and_then(|before| before.nodes.iter().find(|old| old.node == node.node));
        if old.map(told).as_ref() != Some(&told(node)) {
            lines.push(format!("{stamp} {}", told(node)));
        }
    }
    let known = |alarm| before.is_some_and(|before| before.alarms.contains(alarm));
    for alarm in after.alarms.iter().filter(|alarm| !known(alarm)) {
        lines
            .push(format!("{stamp} a person is needed: {}: {}: {}", alarm.node, alarm.reason, alarm.message));
    }
    lines
}

fn age(from: Timestamp, to: Timestamp) -> String {
    span(u64::try_from(to.duration_since(from).as_secs()).unwrap_or(0))
}

/// As kubectl writes ages.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m{}s", seconds / 60, seconds % 60),
        _ => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
