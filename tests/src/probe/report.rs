//! What the prober found: for machines as JSON with a fixed schema, for people as tables. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::flow::{Flow, Kind};
use super::ledger::{Cause, Counts};
use super::pods::Fate;
use super::schedule::Resolution;
use super::table::render;

/// Version of the JSON schema; it rises when a field changes its meaning or goes away.
pub const VERSION: u32 = 1;

/// Everything measured since the start, or since the last reset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// When the report was made, RFC 3339.
    pub made_at: String,
    /// How long was counted, in milliseconds.
    pub duration_ms: f64,
    /// Time between two probes of a flow, in milliseconds.
    pub interval_ms: f64,
    /// How long an answer may take, in milliseconds.
    pub timeout_ms: f64,
    /// Totals by kind of flow, in the order of [`Kind`].
    pub kinds: Vec<KindReport>,
    /// Every flow.
    pub flows: Vec<FlowReport>,
    /// What became of the workloads' pods.
    pub workloads: Vec<MemberReport>,
    /// What became of the nodes; each counts as a workload of one.
    pub nodes: Vec<MemberReport>,
    /// The prober's own resolution.
    pub prober: Resolution,
}

/// One flow, or the sum of several.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Probes sent.
    pub sent: u64,
    /// Probes lost.
    pub lost: u64,
    /// Lost probes whose answer came after the time-out.
    pub late: u64,
    /// Long-lived connections that broke.
    pub reconnects: u64,
    /// Longest time between two consecutive answers, in milliseconds.
    pub longest_gap_ms: f64,
    /// The same, of answers with a loss between them; 0 without losses.
    pub longest_outage_ms: f64,
    /// Slowest answer in time, in milliseconds.
    pub slowest_ms: f64,
    /// Losses by cause.
    pub causes: BTreeMap<Cause, u64>,
}

/// One flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowReport {
    /// What it measures.
    pub kind: Kind,
    /// Where its probes start.
    pub from: String,
    /// Where they go.
    pub to: String,
    /// The nodes that every probe passes; a Service's answering pod may be on others.
    pub nodes: Vec<String>,
    /// What was counted.
    #[serde(flatten)]
    pub figures: Figures,
}

/// All flows of a kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KindReport {
    /// The kind.
    pub kind: Kind,
    /// How many flows.
    pub flows: u64,
    /// Sums, and the longest of each time.
    #[serde(flatten)]
    pub figures: Figures,
}

/// The pods of one workload, or one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberReport {
    /// `Kind/name`.
    pub name: String,
    /// Pods wanted.
    pub pods: u64,
    /// Container restarts.
    pub restarts: u64,
    /// Pods seen to be evicted.
    pub evicted: u64,
    /// Pods whose place a new pod took.
    pub replaced: u64,
    /// Pods that changed their address.
    pub readdressed: u64,
    /// Times below full readiness.
    pub below_full: u64,
    /// Time below full readiness, in milliseconds.
    pub below_full_ms: f64,
    /// Fewest ready pods.
    pub least_ready: u64,
}

fn ms(span: Duration) -> f64 {
    (span.as_secs_f64() * 1_000_000.0).round() / 1000.0
}

impl From<Counts> for Figures {
    fn from(counts: Counts) -> Self {
        Self {
            sent: counts.sent,
            lost: counts.lost,
            late: counts.late,
            reconnects: counts.reconnects,
            longest_gap_ms: ms(counts.longest_gap),
            longest_outage_ms: ms(counts.longest_outage),
            slowest_ms: ms(counts.slowest),
            causes: counts.causes,
        }
    }
}

impl Figures {
    fn add(&mut self, other: &Self) {
        self.sent += other.sent;
        self.lost += other.lost;
        self.late += other.late;
        self.reconnects += other.reconnects;
        self.longest_gap_ms = self.longest_gap_ms.max(other.longest_gap_ms);
        self.longest_outage_ms = self.longest_outage_ms.max(other.longest_outage_ms);
        self.slowest_ms = self.slowest_ms.max(other.slowest_ms);
        for (cause, count) in &other.causes {
            *self.causes.entry(*cause).or_default() += count;
        }
    }

    fn cells(&self) -> Vec<String> {
        let causes: Vec<String> =
            self.causes.iter().map(|(cause, count)| format!("{count} {}", word(cause))).collect();
        vec![
            self.sent.to_string(),
            self.lost.to_string(),
            format!("{:.1}", self.longest_gap_ms),
            format!("{:.1}", self.longest_outage_ms),
            format!("{:.1}", self.slowest_ms),
            self.reconnects.to_string(),
            causes.join(", "),
        ]
    }
}

/// The name a value has in JSON.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

impl FlowReport {
    pub(super) fn new(flow: Flow, counts: Counts) -> Self {
        Self {
            kind: flow.kind,
            from: flow.from.to_string(),
            to: flow.to.to_string(),
            nodes: flow.nodes,
            figures: counts.into(),
        }
    }
}

impl MemberReport {
    pub(super) fn all(fates: BTreeMap<String, Fate>) -> Vec<Self> {
        let report = |(name, fate): (String, Fate)| Self {
            name,
            pods: fate.pods,
            restarts: fate.restarts,
            evicted: fate.evicted,
            replaced: fate.replaced,
            readdressed: fate.readdressed,
            below_full: fate.below_full,
            below_full_ms: ms(fate.below_full_for),
            least_ready: fate.least_ready,
        };
        fates.into_iter().map(report).collect()
    }

    fn cells(&self) -> Vec<String> {
        let mut cells = vec![self.name.clone()];
        let counts =
            [self.pods, self.restarts, self.evicted, self.replaced, self.readdressed, self.below_full];
        cells.extend(counts.map(|count| count.to_string()));
        cells.push(format!("{:.0}", self.below_full_ms));
        cells.push(self.least_ready.to_string());
        cells
    }
}

/// Totals by kind.
pub(super) fn by_kind(flows: &[FlowReport]) -> Vec<KindReport> {
    let mut kinds: BTreeMap<Kind, KindReport> = BTreeMap::new();
    for flow in flows {
        let entry = kinds.entry(flow.kind).or_insert_with(|| KindReport {
            kind: flow.kind,
            flows: 0,
            figures: Figures::default(),
        });
        entry.flows += 1;
        entry.figures.add(&flow.figures);
    }
    kinds.into_values().collect()
}

const FIGURES: [&str; 7] = ["sent", "lost", "gap ms", "outage ms", "slowest ms", "reconnects", "causes"];

impl Report {
    /// Probes lost, of all flows together.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.flows.iter().map(|flow| flow.figures.lost).sum()
    }

    /// Long-lived connections that broke, of all flows together.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.flows.iter().map(|flow| flow.figures.reconnects).sum()
    }

    /// The figures of one kind.
    #[must_use]
    pub fn kind(&self, kind: Kind) -> Option<&KindReport> {
        self.kinds.iter().find(|found| found.kind == kind)
    }

    /// The report as JSON.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// The report as tables: totals by kind, each flow that lost something, workloads, nodes, and the prober itself.
    #[must_use]
    pub fn table(&self) -> String {
        let kinds = self
            .kinds
            .iter()
            .map(|kind| [vec![word(&kind.kind), kind.flows.to_string()], kind.figures.cells()].concat());
        let mut text = render(&[&["kind", "flows"][..], &FIGURES].concat(), kinds);
        let hurt = |flow: &&FlowReport| flow.figures.lost > 0 || flow.figures.reconnects > 0;
        if self.flows.iter().any(|flow| hurt(&flow)) {
            let flows = self.flows.iter().filter(hurt).map(|flow| {
                [vec![word(&flow.kind), flow.from.clone(), flow.to.clone()], flow.figures.cells()].concat()
            });
            text.push('\n');
            text += &render(&[&["flow with losses", "from", "to"][..], &FIGURES].concat(), flows);
        }
        for (title, members) in [("workload", &self.workloads), ("node", &self.nodes)] {
            if !members.is_empty() {
                text.push('\n');
                text += &members_table(title, members);
            }
        }
        let prober = &self.prober;
        let _ = writeln!(
            text,
            "\n{:.1} s, one probe a flow every {:.0} ms, time-out {:.0} ms. Prober: {} of {} ticks late, {} probes skipped, \
             latest tick {:.1} ms, {:.0} % of a core{}",
            self.duration_ms / 1000.0,
            self.interval_ms,
            self.timeout_ms,
            prober.late_ticks,
            prober.ticks,
            prober.skipped_probes,
            prober.max_late_ms,
            prober.cpu_percent,
            if prober.realtime { "" } else { " (no real-time priority)" },
        );
        text
    }
}

fn members_table(title: &str, members: &[MemberReport]) -> String {
    let heads = [
        title,
        "pods",
        "restarts",
        "evicted",
        "replaced",
        "readdressed",
        "below full",
        "below ms",
        "least ready",
    ];
    render(&heads, members.iter().map(MemberReport::cells))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(kind: Kind, from: &str, lost: u64) -> FlowReport {
        FlowReport {
            kind,
            from: from.into(),
            to: "echo@n2".into(),
            nodes: vec!["n1".into(), "n2".into()],
            figures: Figures {
                sent: 500,
                lost,
                longest_gap_ms: 20.0,
                causes: (lost > 0).then_some((Cause::TimedOut, lost)).into_iter().collect(),
                ..Figures::default()
            },
        }
    }

    fn report(flows: Vec<FlowReport>) -> Report {
        Report {
            version: VERSION,
            made_at: "2026-01-01T00:00:00Z".into(),
            duration_ms: 10_000.0,
            interval_ms: 20.0,
            timeout_ms: 500.0,
            kinds: by_kind(&flows),
            flows,
            workloads: MemberReport::all(BTreeMap::from([(
                "Deployment/web".to_owned(),
                Fate { pods: 6, ..Fate::default() },
            )])),
            nodes: vec![],
            prober: Resolution::default(),
        }
    }

    #[test]
    fn totals_add_up_by_kind() {
        let flows = vec![
            flow(Kind::PodToPodOtherNode, "echo@n1", 3),
            flow(Kind::PodToPodOtherNode, "echo@n3", 4),
            flow(Kind::HostToOwnPod, "host@n1", 0),
        ];
        let report = report(flows);
        let total = report.kind(Kind::PodToPodOtherNode).unwrap();
        assert_eq!((total.flows, total.figures.sent, total.figures.lost), (2, 1000, 7));
        assert_eq!(total.figures.causes[&Cause::TimedOut], 7);
        assert_eq!(report.lost(), 7);
    }

    #[test]
    fn json_is_read_back_as_it_was_written() {
        let report = report(vec![flow(Kind::PodToService, "echo@n1", 1)]);
        let text = report.json().unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["version"], 1);
        assert_eq!(value["flows"][0]["kind"], "pod-to-service");
        assert_eq!(value["flows"][0]["longestGapMs"], 20.0);
        assert_eq!(value["flows"][0]["causes"]["timed-out"], 1);
        assert_eq!(value["workloads"][0]["leastReady"], 0);
    }

    #[test]
    fn the_table_lists_flows_only_when_they_lost_something() {
        let quiet = report(vec![flow(Kind::HostToOwnPod, "host@n1", 0)]).table();
        assert!(quiet.contains("host-to-own-pod") && !quiet.contains("host@n1"), "{quiet}");
        let hurt = report(vec![flow(Kind::HostToOwnPod, "host@n1", 2)]).table();
        assert!(hurt.contains("host@n1") && hurt.contains("2 timed-out"), "{hurt}");
    }
}
