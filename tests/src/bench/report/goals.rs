//! What was aimed at, and what was reached.

use super::{Kept, costs::mb, flows, rolls, table};
use crate::bench::{
    history,
    sides::Side,
    stats::{Spread, float, number},
};

struct Goal {
    what: &'static str,
    aim: String,
    /// What was measured, and whether that is enough.
    reached: Option<(String, bool)>,
}

/// What keeps goals from being reached.
pub fn why_not(kept: &Kept) -> String {
    format!(
        "\nTo read where a goal isn't reached:\n\n\
         - The longest gap is that of all flows; those that programs answer need a processor for that. \"The floor\" below has both kinds \
         apart, beside the same gaps at a start of calico-node without any migration.\n\
         - All nodes at once take what calico-node's start on all of them takes on one machine's processors: see \"The floor\".\n\
         - Of the API writes, eight make the node's four blocks with their affinities (a /24 has four of Calico's /26), one per adopted pod is \
         its handle, and some are made once in a cluster, and are counted as a third each here; \"Writes to the API server\" has them all.\n\
         - The coordinator's processor time is a node's work times the nodes in a second: simulated agents have nothing to do, where real ones \
         wait seconds for calico-node.{}\n\
         - What `drain` waits for is in \"Where a node's time goes\".\n",
        at_real_pace(kept)
    )
}

/// The coordinator's processor time where nodes take as long as they do on a real cluster.
fn at_real_pace(kept: &Kept) -> String {
    let Some(node) = Spread::of(kept.node_times(Side::InPlace)).map(|spread| spread.median) else {
        return String::new();
    };
    let largest = kept.scale.iter().filter(|run| run.nodes == 5000 && run.pace == 0.0);
    let hundreds: Vec<_> = largest.filter(|run| run.max.ends_with('%')).collect();
    let cost = Spread::of(hundreds.iter().map(|run| rolls::processor(run)));
    let (Some(cost), Some(first)) = (cost, hundreds.first()) else { return String::new() };
    let share = cost.median * f64::from(first.at_once()) / node / 10.0;
    format!(
        " With {} at a time, at the {} s that a real node takes below, it would come to {} % of a core.",
        first.at_once(),
        number(node),
        number(share)
    )
}

/// One line per goal.
pub fn table_of(kept: &Kept) -> String {
    let goals = comparison(kept).into_iter().chain(costs(kept));
    table(
        &["", "goal", "measured", "reached"],
        goals.map(|goal| {
            let (measured, reached) = match goal.reached {
                Some((measured, true)) => (measured, "yes"),
                Some((measured, false)) => (measured, "**no**"),
                None => ("-".to_owned(), "not measured"),
            };
            vec![goal.what.to_owned(), goal.aim, measured, reached.to_owned()]
        }),
    )
}

/// A value that must not be larger than a limit.
fn at_most(value: Option<f64>, limit: f64, unit: &str) -> Option<(String, bool)> {
    value.map(|value| (format!("{}{unit}", number(value)), value <= limit))
}

fn comparison(kept: &Kept) -> Vec<Goal> {
    let median = |side| Spread::of(kept.node_times(side)).map(|spread| spread.median);
    let peer = median(Side::Peer);
    let share = |side, limit: f64| {
        let (peer, own) = (peer?, median(side)?);
        let text = format!("{} s of {} s: {:.0} %", number(own), number(peer), own * 100.0 / peer);
        Some((text, own <= peer * limit))
    };
    let whole = |side| kept.median(side, |run| history::all_nodes(&run.history).unwrap_or(f64::NAN));
    let worst = |quantity: fn(&crate::bench::sides::Figures) -> f64| {
        let runs = kept.of(Side::InPlace).chain(kept.of(Side::InPlaceAll));
        Spread::of(runs.map(quantity)).map(|spread| spread.most)
    };
    let writes = |side| kept.median(side, |run| float(run.writes()) / float(run.history.len().max(1)));
    vec![
        Goal {
            what: "a node's own time, in-place, against Calico's controller",
            aim: "a fifth or less".into(),
            reached: share(Side::InPlace, 0.2),
        },
        Goal { what: "the same, drain", aim: "two fifths or less".into(), reached: share(Side::Drain, 0.4) },
        Goal {
            what: "pods replaced, in-place",
            aim: "0".into(),
            reached: at_most(worst(|run| float(run.changed_pods.len())), 0.0, ""),
        },
        Goal {
            what: "probes lost on all flows, in-place, worst run",
            aim: "0".into(),
            reached: at_most(worst(|run| float(run.traffic.lost())), 0.0, ""),
        },
        Goal {
            what: "longest gap on any flow, in-place, beyond the prober's resolution, worst run",
            aim: "20 ms".into(),
            reached: at_most(worst(flows::beyond_resolution), 20.0, " ms"),
        },
        Goal {
            what: "the same, on flows that kernels answer",
            aim: "20 ms".into(),
            reached: at_most(worst(flows::beyond_of_kernels), 20.0, " ms"),
        },
        Goal {
            what: "all nodes at once, in-place, first change to last node back, against Calico's controller",
            aim: "a twelfth or less".into(),
            reached: whole(Side::Peer).zip(whole(Side::InPlaceAll)).map(|(peer, own)| {
                (
                    format!("{} s of {} s: 1 : {}", number(own), number(peer), number(peer / own)),
                    own <= peer / 12.0,
                )
            }),
        },
        Goal {
            what: "API writes per node, in-place, pods adopted included",
            aim: "20, and two per adopted pod".into(),
            reached: writes(Side::InPlace).map(|writes| {
                let pods =
                    kept.median(Side::InPlace, |run| float(run.pods) / float(run.history.len().max(1)));
                let limit = 20.0 + 2.0 * pods.unwrap_or(0.0);
                let peer = self::number(
                    kept.median(Side::Peer, |run| float(run.writes()) / 3.0).unwrap_or(f64::NAN),
                );
                (
                    format!(
                        "{} with {} pods; Calico's controller {peer}",
                        number(writes),
                        number(pods.unwrap_or(0.0))
                    ),
                    writes <= limit,
                )
            }),
        },
    ]
}

/// What a node costs in the largest cluster and in the smallest. The smallest of the rounds, for what else the machine does only adds.
fn growth(kept: &Kept) -> Option<(String, bool)> {
    let cost = |nodes: u32, max: &str| {
        let runs = kept.scale.iter().filter(|run| run.pace == 0.0 && run.nodes == nodes && run.max == max);
        Spread::of(runs.map(rolls::processor)).map(|spread| spread.least)
    };
    let all = |max: &str| Some((cost(100, max)?, cost(1000, max)?, cost(5000, max)?));
    let (one, ten) = (all("1")?, all("10")?);
    let text = |(small, middle, large): (f64, f64, f64), max: u32| {
        format!("{}, {} and {} ms with {max} at a time", number(small), number(middle), number(large))
    };
    let enough = [one, ten].iter().all(|(small, _, large)| *large <= small * 1.2);
    Some((format!("{}; {}", text(one, 1), text(ten, 10)), enough))
}

fn costs(kept: &Kept) -> Vec<Goal> {
    let largest: Vec<_> = kept.scale.iter().filter(|figures| figures.nodes == 5000).collect();
    let most = |quantity: &dyn Fn(&crate::bench::scale::Figures) -> f64| {
        Spread::of(largest.iter().map(|figures| quantity(figures))).map(|spread| spread.most)
    };
    let rolling = |paced: bool| {
        let runs = largest.iter().filter(|figures| (figures.pace > 0.0) == paced);
        Spread::of(runs.map(|run| rolls::share(run))).map(|spread| spread.most)
    };
    let switch = kept.switch.iter().filter(|figures| figures.pods == 110).map(|figures| figures.total);
    let rest = kept.rest.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let image =
        |name: &str| kept.images.iter().find(|image| image.name == name).map(|image| mb(image.compressed));
    vec![
        Goal {
            what: "switch of 110 pods",
            aim: "under 300 ms".into(),
            reached: at_most(Spread::of(switch).map(|spread| spread.median), 300.0, " ms"),
        },
        Goal {
            what: "coordinator at 5,000 nodes: resident, at most",
            aim: "under 64 MiB".into(),
            reached: at_most(most(&|figures| float(figures.peak >> 10) / 1024.0), 64.0, " MiB"),
        },
        Goal {
            what: "coordinator at 5,000 nodes: processor while rolling, ten at a time, agents at a real node's pace",
            aim: "under 5 % of a core".into(),
            reached: at_most(rolling(true), 5.0, " %"),
        },
        Goal {
            what: "the same, agents that have nothing to do, at most",
            aim: "under 5 % of a core".into(),
            reached: at_most(rolling(false), 5.0, " %"),
        },
        Goal {
            what: "coordinator: processor time per node at 100, 1,000 and 5,000 nodes, smallest of the rounds",
            aim: "at 5,000 no more than at 100, within a fifth".into(),
            reached: growth(kept),
        },
        Goal {
            what: "coordinator at 5,000 nodes: from leading to the verdict",
            aim: "under 5 s".into(),
            reached: at_most(most(&|figures| figures.judged), 5.0, " s"),
        },
        Goal {
            what: "agent at rest: resident",
            aim: "under 15 MiB".into(),
            reached: at_most(rest.map(|figures| float(figures.usage.resident >> 10) / 1024.0), 15.0, " MiB"),
        },
        Goal {
            what: "agent at rest: processor time",
            aim: "none to be measured".into(),
            reached: at_most(rest.map(|figures| figures.cpu * 60.0 / figures.seconds), 0.05, " s a minute"),
        },
        Goal {
            what: "image of the coordinator, compressed",
            aim: "under 15 MB".into(),
            reached: at_most(image("coordinator"), 15.0, " MB"),
        },
        Goal {
            what: "image of the agent, compressed",
            aim: "under 60 MB".into(),
            reached: at_most(image("agent"), 60.0, " MB"),
        },
    ]
}
