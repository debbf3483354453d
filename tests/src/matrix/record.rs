//! What is known of each combination, kept between runs beside the table that people read.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Combination, Outcome};
use crate::shape::{Layout, Rules};

/// What is kept, in the table's folder.
const RECORD: &str = "versions.json";
/// What people read.
const TABLE: &str = "versions.md";

/// The result of a combination that kept every promise.
const GOOD: &str = "good";

/// All rows that were run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Record {
    rows: Vec<Row>,
}

/// One run of one combination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    name: String,
    kubernetes: String,
    calico: String,
    flannel: String,
    network: String,
    date: String,
    /// Probes without an answer, of how many.
    lost: Option<u64>,
    /// Of these, probes to the outside while flanneld made its rules anew on the node that went back.
    lost_going_back: Option<u64>,
    sent: Option<u64>,
    replaced: Option<usize>,
    /// Longest time without an answer on any flow, in milliseconds.
    longest_gap_ms: Option<f64>,
    /// Mean of the nodes' own times, in seconds.
    seconds_per_node: Option<f64>,
    /// `good`, or what wasn't.
    pub result: String,
}

impl Record {
    /// The record in `docs`; empty where there is none yet.
    pub fn read(docs: &Path) -> Result<Self> {
        let path = docs.join(RECORD);
        match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
        }
    }

    /// Whether the combination was run.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.rows.iter().any(|row| row.name == name)
    }

    /// Whether it was run and kept every promise.
    #[must_use]
    pub fn is_good(&self, name: &str) -> bool {
        self.rows.iter().any(|row| row.name == name && row.result == GOOD)
    }

    /// Takes a run's row, in place of an earlier one of the same combination.
    pub fn put(&mut self, row: Row) {
        self.rows.retain(|other| other.name != row.name);
        self.rows.push(row);
    }

    /// Writes it to `docs`.
    pub fn write(&self, docs: &Path) -> Result<()> {
        let path = docs.join(RECORD);
        let text = format!("{}\n", serde_json::to_string_pretty(self)?);
        fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))
    }
}

impl Row {
    /// A row of the combination that has no figures yet.
    #[must_use]
    pub fn of(combination: &Combination) -> Self {
        let shape = &combination.shape;
        let rules = match shape.rules {
            Rules::Iptables => "iptables",
            Rules::Legacy => "iptables-legacy",
            Rules::Nftables => "nftables",
        };
        let layout = match shape.layout {
            Layout::Canal => ", Canal",
            Layout::Older => ", flannel in kube-system",
            Layout::Current | Layout::Calico => "",
        };
        let family = if shape.dual_stack { ", IPv4 and IPv6" } else { "" };
        Self {
            name: combination.name.to_owned(),
            kubernetes: shape.versions.kubernetes.clone(),
            calico: shape.versions.calico.clone(),
            flannel: shape.versions.flannel.clone(),
            network: format!("kube-proxy {}, flannel {rules}{layout}{family}", shape.kube_proxy.mode()),
            date: jiff::Timestamp::now().to_string().chars().take("2026-01-01".len()).collect(),
            lost: None,
            lost_going_back: None,
            sent: None,
            replaced: None,
            longest_gap_ms: None,
            seconds_per_node: None,
            result: "not run".to_owned(),
        }
    }

    /// Takes what was measured.
    pub fn measured(&mut self, outcome: &Outcome) {
        let (migration, traffic) = (&outcome.migration, &outcome.migration.traffic);
        self.lost_going_back = Some(migration.lost_going_back);
        self.lost = Some(traffic.flows.iter().map(|flow| flow.figures.lost).sum());
        self.sent = Some(traffic.flows.iter().map(|flow| flow.figures.sent).sum());
        self.replaced = Some(migration.changed_pods.len());
        self.longest_gap_ms =
            Some(traffic.flows.iter().map(|flow| flow.figures.longest_gap_ms).fold(0.0, f64::max));
        let times: Vec<f64> = migration.nodes.values().map(|times| times.ended - times.began).collect();
        #[expect(clippy::cast_precision_loss, reason = "a handful of nodes")]
        let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
        self.seconds_per_node = Some(mean);
        let broken = outcome.broken();
        self.result = if broken.is_empty() { GOOD.to_owned() } else { broken.join("; ") };
    }
}

/// Writes the table that people read.
pub fn write_table(docs: &Path, record: &Record, all: &[Combination]) -> Result<()> {
    let mut text = String::from(HEAD);
    for combination in all {
        let unknown = Row::of(combination);
        let row = record.rows.iter().find(|row| row.name == combination.name).unwrap_or(&unknown);
        let date = if record.has(combination.name) { row.date.as_str() } else { "-" };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {date} | {} | {} | {} | {} | {} | {} |",
            row.name,
            row.kubernetes,
            row.calico,
            row.flannel,
            row.network,
            row.lost.zip(row.sent).map_or_else(|| "-".to_owned(), |(lost, sent)| format!("{lost} of {sent}")),
            row.lost_going_back.map_or_else(|| "-".to_owned(), |lost| lost.to_string()),
            row.replaced.map_or_else(|| "-".to_owned(), |count| count.to_string()),
            row.longest_gap_ms.map_or_else(|| "-".to_owned(), |gap| format!("{gap:.0} ms")),
            row.seconds_per_node.map_or_else(|| "-".to_owned(), |time| format!("{time:.1} s")),
            row.result.replace('|', "/"),
        );
    }
    let path = docs.join(TABLE);
    fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))
}

const HEAD: &str = "# Versions that were tried

Each row is a real cluster of two nodes, migrated in place under traffic with one probe a flow every 20 ms. In between one node is
rolled back to flannel and looked at for what Calico leaves, and goes again. At the end NetworkPolicies must be enforced and nothing
of flannel's may be left. *Going back* are those of the lost probes that pods sent to the outside while flanneld made its masquerade
rules anew on the node that was rolled back, the only loss that is known there. `hack/matrix` makes the table; `hack/matrix --again NAME` runs a row once more. containerd is v2.4.2.

| combination | Kubernetes | Calico | flannel | data plane | date | lost | going back | pods replaced | longest gap | time per node | result |
|---|---|---|---|---|---|---|---|---|---|---|---|
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::combinations;

    #[test]
    fn a_row_is_kept_replaced_and_shown() {
        let docs = tempfile::tempdir().unwrap();
        let all = combinations();
        let mut record = Record::read(docs.path()).unwrap();
        assert!(!record.has("default"));
        let mut row = Row::of(&all[0]);
        row.result = "failed: it | rained".to_owned();
        record.put(row.clone());
        assert!(record.has("default") && !record.is_good("default"));
        row.result = GOOD.to_owned();
        record.put(row);
        record.write(docs.path()).unwrap();
        let record = Record::read(docs.path()).unwrap();
        assert!(record.is_good("default"));
        write_table(docs.path(), &record, &all).unwrap();
        let text = fs::read_to_string(docs.path().join(TABLE)).unwrap();
        assert!(text.contains("| good |") && text.contains("| not run |"), "{text}");
    }
}
