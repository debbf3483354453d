//! One text and a few charts of all figures that are kept.

mod costs;
mod flows;
mod goals;
mod rolls;

use std::{fmt::Write as _, fs};

use anyhow::{Context, Result};
use jiff::Timestamp;

use super::{
    checkout, history, images, kept, rest, scale,
    sides::{Figures, Side},
    stats::{Spread, float, number, shown},
    svg::{self, Bar},
    switch,
};

/// All figures.
#[derive(Debug, Default)]
pub struct Kept {
    /// Of the comparison.
    pub sides: Vec<Figures>,
    /// Of big clusters.
    pub scale: Vec<scale::Figures>,
    /// Of the switch alone.
    pub switch: Vec<switch::Figures>,
    /// Of the agent at rest.
    pub rest: Vec<rest::Figures>,
    /// Of the images.
    pub images: Vec<images::Figures>,
}

impl Kept {
    /// Reads what is kept.
    pub fn read() -> Result<Self> {
        let (switch, rest): (Vec<Vec<_>>, Vec<Vec<_>>) = (kept("switch")?, kept("rest")?);
        let images: Vec<Vec<_>> = kept("images")?;
        Ok(Self {
            sides: kept("sides-")?,
            scale: kept("scale-")?,
            switch: switch.into_iter().flatten().collect(),
            rest: rest.into_iter().flatten().collect(),
            images: images.into_iter().flatten().collect(),
        })
    }

    /// The runs of one side.
    fn of(&self, side: Side) -> impl Iterator<Item = &Figures> {
        self.sides.iter().filter(move |figures| figures.side == side)
    }

    /// Own times of all nodes in all runs of a side, in seconds.
    fn node_times(&self, side: Side) -> impl Iterator<Item = f64> {
        self.of(side).flat_map(|run| run.history.values().filter_map(|moments| history::own_time(moments)))
    }

    /// The median of a quantity over the runs of a side.
    fn median(&self, side: Side, quantity: impl Fn(&Figures) -> f64) -> Option<f64> {
        Spread::of(self.of(side).map(quantity)).map(|spread| spread.median)
    }
}

/// Writes `docs/bench.md` and the charts beside it.
pub fn write() -> Result<()> {
    let kept = Kept::read()?;
    let docs = checkout()?.join("docs");
    let put = |name: &str, text: &str| {
        let path = docs.join(name);
        fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))
    };
    put("bench.md", &text(&kept))?;
    let bars = |quantity: &dyn Fn(Side) -> Option<Spread>| -> Vec<Bar> {
        Side::ALL
            .iter()
            .filter_map(|side| Some(Bar { name: side.title().into(), spread: quantity(*side)? }))
            .collect()
    };
    let charts = [
        (
            "bench-nodes.svg",
            svg::bars("A node's own time", "s", &bars(&|side| Spread::of(kept.node_times(side))), false),
        ),
        (
            "bench-gap.svg",
            svg::bars(
                "Longest gap on any flow (logarithmic)",
                "ms",
                &bars(&|side| Spread::of(kept.of(side).map(flows::longest_gap))),
                true,
            ),
        ),
        (
            "bench-scale.svg",
            svg::bars("Coordinator: processor time per node", "ms", &rolls::bars(&kept.scale), false),
        ),
        (
            "bench-switch.svg",
            svg::bars("The switch by number of pods", "ms", &costs::switch_bars(&kept), false),
        ),
    ];
    for (name, chart) in charts {
        put(name, &chart)?;
    }
    eprintln!("bench: {} is written", docs.join("bench.md").display());
    Ok(())
}

fn text(kept: &Kept) -> String {
    let rounds = kept.sides.iter().map(|figures| figures.round).max().unwrap_or(0);
    let mut text = format!(
        "# Benchmark\n\n\
         Made by `hack/bench` on {}; {}. Figures are medians, in parentheses the smallest and the largest. They hold for this machine, \
         on which everything runs side by side: compare ratios.\n\n",
        Timestamp::now().strftime("%Y-%m-%d"),
        machine(),
    );
    text.push_str("## The goals\n\n");
    text.push_str(&goals::table_of(kept));
    text.push_str(&goals::why_not(kept));
    let _ = write!(
        text,
        "\n## Beside Calico's own controller\n\n\
         Three nodes, the same workloads (echo and echo2 on every node, six web pods behind Services), a prober with one probe a flow every 10 ms \
         and a time-out of 2 s; a fresh cluster for each run, {rounds} round{}, alternating order. Calico's controller is that of Calico v3.28.5, \
         with its stock manifest; its `kubectl drain --delete-local-data` is translated for today's kubectl. Images are on the nodes before.\n\n\
         A node's own time is from its first change (cordon, lease or network label) to the last moment at which it becomes schedulable and \
         verified: for our side that is after the verification with traffic, for Calico's controller after calico-node is Ready. The pods that \
         a drain leaves are made anew after that, and the next node waits for them; Calico's controller deletes them before, and waits for none.\n\n",
        if rounds == 1 { "" } else { "s" }
    );
    text.push_str(&sides(kept));
    text.push_str("\n![A node's own time](bench-nodes.svg)\n\n### Where a node's time goes\n\n");
    text.push_str(&phases(kept));
    text.push_str("\n### Flows\n\n");
    text.push_str(&flows::table(kept));
    text.push_str("\n![Longest gap](bench-gap.svg)\n\n### The floor\n\n");
    text.push_str(&flows::floor(kept));
    text.push_str("\n### Writes to the API server\n\n");
    text.push_str(&flows::writes(kept));
    text.push_str("\n### Left behind\n\n");
    text.push_str(&flows::leftovers(kept));
    text.push_str(&costs::text(kept));
    // Measured on a machine that hack/fresh makes, not on this one.
    text.push_str(include_str!("report/from_nothing.md"));
    text
}

fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpus.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": "))
            .map_or("an unknown processor", |(_, value)| value)
            .to_owned()
    };
    let cores = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release: Vec<&str> = kernel.trim().split(['.', '-']).take(2).collect();
    format!("{cores} cores ({}), Linux {}", field("model name"), release.join("."))
}

/// A table whose first column is a name.
fn table(heads: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut text = format!("| {} |\n|{}\n", heads.join(" | "), "---|".repeat(heads.len()));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

fn sides(kept: &Kept) -> String {
    type Row<'a> = (&'a str, &'a dyn Fn(&Figures) -> f64);
    let rows: [Row<'_>; 9] = [
        ("first change to last node back, s", &|run| history::all_nodes(&run.history).unwrap_or(f64::NAN)),
        ("Job: apply to complete, s", &|run| run.job_seconds),
        ("pods replaced, restarted or moved", &|run| float(run.changed_pods.len())),
        ("probes lost", &|run| float(run.traffic.lost())),
        ("longest gap on any flow, ms", &flows::longest_gap),
        ("long-lived connections that broke", &flows::broken),
        ("API writes per node", &|run| float(run.writes()) / float(run.history.len().max(1))),
        ("left on a node, lines", &|run| float(run.on_nodes.len()) / float(run.history.len().max(1))),
        ("left of flannel in the API, objects", &|run| float(run.in_api.len())),
    ];
    let cells = |name: &str, of: &dyn Fn(Side) -> Vec<f64>| {
        let peer = Spread::of(of(Side::Peer));
        let mut row = vec![name.to_owned()];
        for side in Side::ALL {
            let own = Spread::of(of(side));
            row.push(match (peer, own) {
                (_, None) => "-".to_owned(),
                (Some(peer), Some(own)) if side != Side::Peer && own.median > 0.0 && peer.median > 0.0 => {
                    format!("{own}, 1 : {}", number(peer.median / own.median))
                }
                (_, Some(own)) => own.to_string(),
            });
        }
        row
    };
    let mut heads = vec![""];
    heads.extend(Side::ALL.iter().map(|side| side.title()));
    let times = cells("a node's own time, s", &|side| kept.node_times(side).collect());
    let others =
        rows.iter().map(|(name, quantity)| cells(name, &|side| kept.of(side).map(quantity).collect()));
    let mut text = table(&heads, [times].into_iter().chain(others));
    text.push_str("\n`1 : x`: Calico's controller takes x times as much.\n");
    text
}

fn phases(kept: &Kept) -> String {
    let sides = [Side::Drain, Side::InPlace, Side::InPlaceAll];
    let mut names: Vec<&'static str> = Vec::new();
    let mut spans: Vec<(Side, &'static str, f64)> = Vec::new();
    for side in sides {
        for moments in kept.of(side).flat_map(|run| run.history.values()) {
            for (name, span) in history::phases(moments) {
                if !names.contains(&name) {
                    names.push(name);
                }
                spans.push((side, name, span));
            }
        }
    }
    let rows = names.iter().map(|name| {
        let cell = |side: &Side| {
            shown(spans.iter().filter(|(of, what, _)| of == side && what == name).map(|(_, _, span)| *span))
        };
        [vec![(*name).to_owned()], sides.iter().map(cell).collect()].concat()
    });
    let mut text = table(&["seconds", "drain", "in-place", "in-place, all at once"], rows);
    text.push_str(
        "\nThe floor of a node's time is flannel's pod ending, the switch itself and calico-node's start, which are the kubelet's, the \
         kernel's and Calico's; the rest is ours.\n",
    );
    text
}
