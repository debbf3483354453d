//! A table of faults: where each came, how it ended and what it cost.

use std::{cell::RefCell, collections::BTreeSet, fmt, thread, time::Duration};

use flannel_migration_tests::{
    probe::{Kind, Prober, Report},
    run,
};

/// What was lost on all flows, or on those of all nodes but one.
#[derive(Default)]
pub struct Losses {
    lost: u64,
    sent: u64,
    broken: u64,
    outage: f64,
    kinds: BTreeSet<Kind>,
    /// Each flow that lost something, in words.
    flows: Vec<String>,
}

impl Losses {
    fn add(&mut self, report: &Report, but: Option<&str>) {
        let counts = |node: &String| but.is_none_or(|but| node != but);
        for flow in report.flows.iter().filter(|flow| flow.nodes.iter().all(counts)) {
            self.lost += flow.figures.lost;
            self.sent += flow.figures.sent;
            self.broken += flow.figures.reconnects;
            self.outage = self.outage.max(flow.figures.longest_outage_ms);
            if flow.figures.lost > 0 {
                self.kinds.insert(flow.kind);
                let figures = &flow.figures;
                self.flows.push(format!(
                    "{:?} {} -> {}: {} lost, longest outage {:.0} ms, {:?}",
                    flow.kind, flow.from, flow.to, figures.lost, figures.longest_outage_ms, figures.causes
                ));
            }
        }
    }
}

impl Losses {
    /// Whether nothing was lost, and no connection broken.
    pub fn none(&self) -> bool {
        self.lost == 0 && self.broken == 0
    }

    /// The kinds of flows that lost something and lead to pods by themselves, not by a Service's list of those that are ready.
    pub fn beyond_services(&self) -> Vec<Kind> {
        let by_service = |kind: &Kind| matches!(kind, Kind::PodToService | Kind::OutsideToNodePort);
        self.kinds.iter().copied().filter(|kind| !by_service(kind)).collect()
    }
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost, sent, broken, outage, kinds, flows: _ } = self;
        write!(f, "{lost} of {sent}, longest outage {outage:.0} ms, {broken} broken")?;
        if kinds.is_empty() { Ok(()) } else { write!(f, ", on {kinds:?}") }
    }
}

/// Rows of the table that `hack/faults` prints.
pub struct Matrix<'a> {
    prober: &'a Prober,
    title: &'static str,
    losses: RefCell<Losses>,
}

impl<'a> Matrix<'a> {
    pub fn new(title: &'static str, prober: &'a Prober) -> Self {
        // The test's name may stand in the line still.
        eprintln!("{title}:");
        Self { prober, title, losses: RefCell::default() }
    }

    /// What is lost from now on is the next fault's.
    pub fn reset(&self) {
        self.prober.reset().unwrap();
        self.losses.take();
    }

    /// Traffic flows whole again soon; what was lost until then is the fault's.
    pub fn expect_connected(&self) {
        self.count();
        let count = |report: &Report| self.losses.borrow_mut().add(report, None);
        connected_counting(self.prober, Duration::from_secs(20), count);
        self.prober.reset().unwrap();
    }

    /// What was lost until now is the fault's, also when the prober starts anew.
    pub fn count(&self) {
        self.losses.borrow_mut().add(&self.prober.report().unwrap(), None);
        self.prober.reset().unwrap();
    }

    /// One fault that is over; losses of all flows count but those of `but`, a node that is down.
    pub fn row(&self, fault: &str, at: &str, outcome: &str, but: Option<&str>) -> Losses {
        let mut losses = self.losses.take();
        losses.add(&self.prober.report().unwrap(), but);
        let whose = but.map(|node| format!(" without {node}'s own")).unwrap_or_default();
        eprintln!("| {} | {fault} | {at} | {outcome} | {losses}{whose} |", self.title);
        losses.flows.iter().for_each(|flow| eprintln!("  {flow}"));
        self.reset();
        losses
    }
}

/// Traffic flows whole again: every flow, for a whole second.
pub fn connected(prober: &Prober, limit: Duration) {
    connected_counting(prober, limit, |_| ());
}

fn connected_counting(prober: &Prober, limit: Duration, count: impl Fn(&Report)) {
    let mut lines = Vec::new();
    run::wait_for("nothing is lost any more", limit, || {
        prober.reset()?;
        thread::sleep(Duration::from_secs(1));
        let report = prober.report()?;
        count(&report);
        let losing = report.flows.iter().filter(|flow| flow.figures.lost > 0 || flow.figures.sent == 0);
        lines = losing.map(|flow| format!("{:?} {} -> {}", flow.kind, flow.from, flow.to)).collect();
        Ok(lines.is_empty())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", lines.join("\n")));
}
