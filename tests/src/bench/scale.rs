//! The coordinator in big clusters: a real API server, nodes that are objects, simulated agents, and the real program.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    agents::{Agents, Courses},
    audit::{self, Calls},
    objects, process,
    relay::Relay,
    stats::float,
};
use crate::{
    bed::{Bed, teardown},
    images,
};

/// Pods that each simulated agent takes over.
pub const PODS: u32 = 3;
/// Name of the test bed.
pub const BED: &str = "b-scale";
/// How long an agent waits for Calico where it isn't there at once: about as long as on the nodes of `hack/bench sides`.
const PACE: Duration = Duration::from_millis(4500);
/// How long the start may take.
const START: Duration = Duration::from_mins(8);

/// What one coordinator did, from its start to its end.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Nodes of the cluster.
    pub nodes: u32,
    /// `max-unavailable`.
    pub max: String,
    /// Which of the rounds.
    pub round: u32,
    /// Seconds that each agent waits for Calico; 0: it has nothing to do.
    pub pace: f64,
    /// Whether another one was killed in the middle of the roll just before.
    pub restarted: bool,
    /// Seconds from the start to leading. After a kill, the dead one's lease has to run out first.
    pub led: f64,
    /// Seconds from leading to the verdict that the cluster can be migrated.
    pub judged: f64,
    /// Seconds from there until every node is prepared. Only the first one has to write much.
    pub prepared: f64,
    /// Seconds from there to the first step of the roll.
    pub decided: f64,
    /// Nodes taken through in the time that was measured.
    pub taken: u32,
    /// How long that was, in seconds.
    pub seconds: f64,
    /// Seconds of each node's lease, and of these its agent's, medians.
    pub lease: f64,
    /// Of these its agent's.
    pub agent: f64,
    /// Processor time in these seconds.
    pub cpu: f64,
    /// How often it waited for something in these seconds.
    pub waits: u64,
    /// Processor time before, from the start on.
    pub cpu_start: f64,
    /// The most memory that was resident, in bytes.
    pub peak: u64,
    /// Bytes sent to the API server, and received, in these seconds.
    pub sent: u64,
    /// Received.
    pub received: u64,
    /// Bytes received before.
    pub received_start: u64,
    /// The coordinator's calls in these seconds.
    pub calls: Calls,
    /// The coordinator's calls before.
    pub calls_start: Calls,
}

impl Figures {
    /// `max-unavailable` as a number of nodes.
    #[must_use]
    pub fn at_once(&self) -> u32 {
        at_once(&self.max, self.nodes)
    }

    /// How nodes were taken through, in words.
    #[must_use]
    pub fn manner(&self) -> String {
        if self.pace > 0.0 { format!("{}, agents take {} s", self.max, self.pace) } else { self.max.clone() }
    }

    /// A quantity per node taken through.
    #[must_use]
    pub fn per_node(&self, quantity: f64) -> f64 {
        quantity / float(self.taken.max(1))
    }
}

fn at_once(max: &str, nodes: u32) -> u32 {
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    max.strip_suffix('%').map_or_else(|| number(max), |percent| nodes * number(percent) / 100).max(1)
}

/// One coordinator's turn. It is measured when as many nodes are through as are in change at once: before, more is begun than ended.
#[derive(Debug, Clone, Copy)]
struct Turn {
    max: &'static str,
    /// Ends when so many nodes are through since,
    nodes: u32,
    /// or after this time.
    limit: Duration,
    /// How long each agent waits for Calico.
    pace: Duration,
}

/// One cluster of `count` nodes, coordinators one after another, each but the first after a kill.
pub fn run(count: u32, round: u32, testbed: &Path) -> Result<()> {
    teardown::down(BED)?;
    let result = measure(count, round, testbed);
    teardown::down(BED)?;
    result
}

fn measure(count: u32, round: u32, testbed: &Path) -> Result<()> {
    let program = images::shipped()?.join("coordinator");
    let bed = Bed::up_without_nodes(BED, objects::shape()?, testbed)?;
    objects::furnish(&bed)?;
    let began = Instant::now();
    objects::make_nodes(&bed, count)?;
    eprintln!("bench: {count} nodes made in {:.1} s", began.elapsed().as_secs_f64());
    let scratch = tempfile::tempdir()?;
    let agents = Agents::start(&bed.plan.kubeconfig(), PODS, scratch.path())?;
    let flat_out =
        |max, nodes: u32| Turn { max, nodes, limit: Duration::from_secs(90), pace: Duration::ZERO };
    let mut turns = vec![flat_out("1", (count / 5).min(50)), flat_out("10", (count / 5).min(100))];
    // A small cluster's nodes are few.
    if count >= 1000 {
        turns.push(Turn { pace: PACE, ..flat_out("10", 60) });
    }
    // The last: hundreds that its end leaves half-way would be the next one's.
    turns.push(flat_out("10%", (count / 5).min(1000)));
    for (number, turn) in turns.into_iter().enumerate() {
        let figures = one(&bed, &program, &agents, (count, round), turn, number > 0)
            .with_context(|| format!("{count} nodes, max-unavailable {}", turn.max))?;
        eprintln!("bench: {}", line(&figures));
        super::keep(&format!("scale-{count:05}-{round}-{number}"), &figures)?;
    }
    Ok(())
}

fn line(figures: &Figures) -> String {
    format!(
        "{} nodes, max-unavailable {}: {} nodes in {:.1} s, {:.1} ms of CPU a node, peak {} MiB; led {:.1} s, judged {:.1} s, \
         prepared {:.1} s, decided {:.1} s",
        figures.nodes,
        figures.manner(),
        figures.taken,
        figures.seconds,
        figures.per_node(figures.cpu) * 1000.0,
        figures.peak >> 20,
        figures.led,
        figures.judged,
        figures.prepared,
        figures.decided,
    )
}

fn one(
    bed: &Bed,
    program: &Path,
    agents: &Agents,
    cluster: (u32, u32),
    turn: Turn,
    restarted: bool,
) -> Result<Figures> {
    let logged = audit::position(bed)?;
    agents.pace(turn.pace);
    let coordinator = Coordinator::start(bed, program, turn.max)?;
    let outcome = follow(bed, agents, cluster, turn, restarted, logged, &coordinator);
    outcome.with_context(|| format!("the coordinator said:\n{}", coordinator.last_words()))
}

fn follow(
    bed: &Bed,
    agents: &Agents,
    (count, round): (u32, u32),
    turn: Turn,
    restarted: bool,
    logged: u64,
    coordinator: &Coordinator,
) -> Result<Figures> {
    let started = Instant::now();
    while coordinator.milestones()?.decided.is_none() {
        coordinator.runs()?;
        ensure!(started.elapsed() < START, "no step within {} s", START.as_secs());
        std::thread::sleep(Duration::from_millis(100));
    }
    let through = |courses: &Courses, before: &Courses| {
        let new = courses.iter().filter(|(name, course)| {
            course.released.is_some() && before.get(*name).is_none_or(|before| before.released.is_none())
        });
        u32::try_from(new.count()).unwrap_or(u32::MAX)
    };
    let pass = |before: &Courses, nodes: u32| {
        let began = Instant::now();
        while began.elapsed() < turn.limit && through(&agents.courses(), before) < nodes {
            coordinator.runs()?;
            std::thread::sleep(Duration::from_millis(20));
        }
        anyhow::Ok(through(&agents.courses(), before))
    };
    let in_change = at_once(turn.max, count);
    ensure!(
        pass(&agents.courses(), in_change)? >= in_change,
        "fewer than {in_change} nodes within {} s",
        turn.limit.as_secs()
    );
    let (began, before) = (Instant::now(), agents.courses());
    let (start, at_start) = (process::usage(coordinator.pid())?, audit::position(bed)?);
    let passed_start = coordinator.relay.passed();
    pass(&before, turn.nodes)?;
    let (seconds, end, after) =
        (began.elapsed().as_secs_f64(), process::usage(coordinator.pid())?, agents.courses());
    let passed = coordinator.relay.passed();
    let calls = |from| audit::since(bed, from).map(|mut all| all.remove("controller").unwrap_or_default());
    let (all, rolling) = (calls(logged)?, calls(at_start)?);
    let own = |holds: &dyn Fn(&super::agents::Course) -> Option<f64>| {
        let new =
            after.iter().filter(|(name, _)| before.get(*name).is_none_or(|course| course.leased.is_none()));
        super::stats::Spread::of(new.filter_map(|(_, course)| holds(course)))
            .map_or(f64::NAN, |spread| spread.median)
    };
    let milestones = coordinator.milestones()?;
    let at = |at: Option<f64>| at.context("a milestone is missing in the coordinator's log");
    let (led, judged) = (at(milestones.led)?, at(milestones.judged)?);
    let (prepared, decided) = (at(milestones.prepared)?, at(milestones.decided)?);
    Ok(Figures {
        nodes: count,
        max: turn.max.to_owned(),
        round,
        pace: turn.pace.as_secs_f64(),
        restarted,
        led,
        judged: judged - led,
        prepared: prepared - judged,
        decided: decided - prepared,
        taken: through(&after, &before),
        seconds,
        lease: own(&|course| Some((course.released? - course.leased?).as_secs_f64())),
        agent: own(&|course| course.released.map(|_| course.agent.as_secs_f64())),
        cpu: end.cpu.saturating_sub(start.cpu).as_secs_f64(),
        waits: end.waits.saturating_sub(start.waits),
        cpu_start: start.cpu.as_secs_f64(),
        peak: end.peak,
        sent: passed.0 - passed_start.0,
        received: passed.1 - passed_start.1,
        received_start: passed_start.1,
        calls_start: all
            .iter()
            .map(|(call, count)| (call.clone(), count - rolling.get(call).unwrap_or(&0).min(count)))
            .collect(),
        calls: rolling,
    })
}

/// When the coordinator got where, in seconds since its start.
#[derive(Debug, Default)]
struct Milestones {
    led: Option<f64>,
    judged: Option<f64>,
    prepared: Option<f64>,
    decided: Option<f64>,
}

/// The real program, killed when the value goes.
struct Coordinator {
    child: std::cell::RefCell<Child>,
    log: PathBuf,
    relay: Relay,
    started: Timestamp,
}

impl Coordinator {
    fn start(bed: &Bed, program: &Path, max: &str) -> Result<Self> {
        let directory = bed.plan.directory();
        let mut config: Value = serde_json::from_str(&fs::read_to_string(bed.plan.kubeconfig())?)?;
        let server =
            config.pointer_mut("/clusters/0/cluster/server").context("no server in the kubeconfig")?;
        let port = server.as_str().and_then(|server| server.rsplit_once(':')?.1.parse().ok());
        let relay = Relay::start(port.context("no port in the kubeconfig")?)?;
        *server = json!(format!("https://127.0.0.1:{}", relay.port()));
        let create =
            ["-n", "kube-system", "create", "token", "flannel-migration-controller", "--duration=2h"];
        let token = bed.kubectl(&create)?;
        *config.pointer_mut("/users/0/user").context("no user in the kubeconfig")? =
            json!({ "token": token.trim() });
        let kubeconfig = directory.join("coordinator.kubeconfig");
        fs::write(&kubeconfig, config.to_string())?;
        let log = directory.join(format!("coordinator-{}.log", relay.port()));
        let child = process::with_bed(bed, program)?
            .arg("run")
            .env("KUBECONFIG", &kubeconfig)
            .envs([("STRATEGY", "in-place"), ("MAX_UNAVAILABLE", max), ("LOG_FORMAT", "json")])
            .env("ADMIN_ADDRESS", "127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("can't start {}", program.display()))?;
        Ok(Self { child: child.into(), log, relay, started: Timestamp::now() })
    }

    fn pid(&self) -> u32 {
        self.child.borrow().id()
    }

    fn runs(&self) -> Result<()> {
        match self.child.borrow_mut().try_wait()? {
            None => Ok(()),
            Some(status) => bail!("it ended: {status}"),
        }
    }

    /// Read from what it logs.
    fn milestones(&self) -> Result<Milestones> {
        let mut found = Milestones::default();
        for line in fs::read_to_string(&self.log)?.lines() {
            let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
            let text = |field: &str| line.get(field).and_then(Value::as_str).unwrap_or_default();
            let Ok(at) = text("timestamp").parse::<Timestamp>() else { continue };
            let at = at.duration_since(self.started).as_secs_f64();
            let milestone = match (text("step"), text("message")) {
                ("lead", _) => &mut found.led,
                ("preflight", "the cluster can be migrated") => &mut found.judged,
                ("prepare", "the cluster is prepared") => &mut found.prepared,
                ("grant" | "clear" | "register" | "settle" | "enrol" | "relabel", _) => &mut found.decided,
                _ => continue,
            };
            milestone.get_or_insert(at);
            if found.decided.is_some() {
                break;
            }
        }
        Ok(found)
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(10)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // A kill, not an end: the next one finds everything in the middle.
        let child = self.child.get_mut();
        let _ = child.kill();
        let _ = child.wait();
    }
}
