//! The agent is killed whenever its journal says that an operation was begun, or done, and on the way back whenever one was undone.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::{
    AGENT, bed, complete, expect_migrated, items,
    matrix::{agent_process, journal, progress, read, replace_agent, rest_on},
    rollback::command,
    table::Matrix,
};
use flannel_migration_tests::{
    bed::Bed,
    migration,
    probe::{Options, Prober, Workloads, deploy_to},
    run,
    shape::{NodeShape, Shape},
};

/// Operations in the order in which they are done.
const OPERATIONS: [&str; 9] = [
    "swap-config",
    "rename-device",
    "rename-ports",
    "prepare-pods",
    "route-pods",
    "move-pods",
    "delete-bridge",
    "remove-rules",
    "remove-files",
];

/// When to kill: at the first sight of an operation in this state, or of its absence after it was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Begun,
    Done,
    Undone,
}

/// One kill: what the journal said then, and at the death.
struct Kill {
    at: String,
    left: String,
    state: String,
}

/// Kills the agent of one node at each operation, once, as the journal shows them.
struct Killer {
    stop: Arc<AtomicBool>,
    kills: Arc<Mutex<Vec<Kill>>>,
    thread: JoinHandle<()>,
}

impl Killer {
    fn start(bed: &Bed, node: &str, at: At) -> Self {
        let (stop, kills) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (path, netns) = (journal(bed, node), bed.plan.netns(node));
        let (stopped, killed, bed, node) =
            (Arc::clone(&stop), Arc::clone(&kills), bed.clone(), node.to_owned());
        let thread = thread::spawn(move || {
            let mut left: Vec<&str> = OPERATIONS.to_vec();
            let mut process = agent_process(&netns);
            let mut before = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let entry = read(&path);
                let now = progress(&entry);
                let hit = left.iter().position(|op| {
                    let is = |state: &str| now.iter().any(|(name, how)| name == op && how == state);
                    match at {
                        At::Begun => is("begun"),
                        At::Done => is("done"),
                        At::Undone => {
                            before.contains(&(*op).to_owned()) && !now.iter().any(|(name, _)| name == op)
                        }
                    }
                });
                before = now.into_iter().map(|(name, _)| name).collect();
                let (Some(hit), Some(pid)) = (hit, process) else {
                    // A rename gives no event that is faster than looking.
                    thread::sleep(Duration::from_micros(200));
                    continue;
                };
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
                let op = left.remove(hit);
                let entry = read(&path);
                let last = progress(&entry)
                    .pop()
                    .map_or("nothing".to_owned(), |(name, how)| format!("{name} {how}"));
                let kill = Kill {
                    at: format!("{op} {at:?}").to_lowercase(),
                    left: last,
                    state: entry["state"].as_str().unwrap_or_default().to_owned(),
                };
                killed.lock().unwrap().push(kill);
                process = replace_agent(&bed, &node, Some(pid));
            }
        });
        Self { stop, kills, thread }
    }

    /// Ends, and tells of each kill and of what all of them cost; returns how many there were.
    fn end(self, matrix: &Matrix, how: &str, outcome: &str) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        let kills = self.kills.lock().unwrap();
        for kill in kills.iter() {
            let Kill { at, left, state } = kill;
            eprintln!(
                "| m-kills | agent killed | {how}, {at}; journal at death: {state}, {left} | {outcome} |  |"
            );
        }
        matrix.row(&format!("agent killed {} times", kills.len()), how, outcome, None);
        kills.len()
    }
}

#[test]
fn an_agent_killed_at_any_operation_goes_on_where_it_was_and_no_pod_is_replaced() {
    let scratch = bed("m-kills", Shape { nodes: NodeShape::numbered(2), ..Shape::default() });
    let bed = &scratch.bed;
    deploy_to(&bed.plan.kubeconfig(), &Workloads::default(), Duration::from_mins(2)).unwrap();
    let mut before = migration::pods::identities(bed).unwrap();
    let prober = Prober::start(
        bed.site().unwrap(),
        Options { interval: Duration::from_millis(20), ..Options::default() },
    )
    .unwrap();
    migration::apply_with(bed, &[("STRATEGY", "in-place"), ("NODE_BUDGET", "240s")], |job| {
        job["metadata"]["annotations"]["flannel-migration/request"] = "pause".into();
        job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] = "n2".into();
    })
    .unwrap();
    let agents = || {
        let pods = bed.get(&["-n", "kube-system", "pods", "-l", &format!("k8s-app={AGENT}")])?;
        Ok(items(&pods).iter().filter(|pod| pod["status"]["phase"] == "Running").count() == 2)
    };
    run::wait_for("the agents run", Duration::from_mins(1), agents).unwrap();
    // The second node isn't started before the first is through.
    command(bed, &["pause", "n2"]);
    let matrix = Matrix::new("m-kills", &prober);
    let unchanged = |before: &_| {
        let changed = migration::pods::differences(before, &migration::pods::identities(bed).unwrap());
        assert!(changed.is_empty(), "{}", changed.join("\n"));
    };
    matrix.reset();
    let killer = Killer::start(bed, "n1", At::Begun);
    command(bed, &["resume"]);
    rest_on(bed, "n1", "calico");
    let mut kills = killer.end(&matrix, "in-place", "migrated");

    // All of it back, killed after each operation that was undone; forward again by a drain; and the other node, killed after each that
    // was done.
    if std::env::var_os("FAULTS").is_some() {
        let killer = Killer::start(bed, "n1", At::Undone);
        command(bed, &["rollback", "n1"]);
        rest_on(bed, "n1", "flannel");
        kills += killer.end(&matrix, "going back", "flannel's again");
        unchanged(&before);
        bed.kubectl(&["annotate", "node", "n1", "flannel-migration/strategy=drain"]).unwrap();
        let killer = Killer::start(bed, "n1", At::Begun);
        command(bed, &["resume", "n1"]);
        rest_on(bed, "n1", "calico");
        kills += killer.end(&matrix, "drain", "migrated");
        bed.kubectl(&["annotate", "node", "n1", "flannel-migration/strategy-"]).unwrap();
        run::wait_for("pods are Ready", Duration::from_mins(1), || {
            Ok(migration::checks::pods(bed)?.is_empty())
        })
        .unwrap();
        before = migration::pods::identities(bed).unwrap();
        matrix.reset();
    }
    let killer = Killer::start(bed, "n2", At::Done);
    command(bed, &["resume", "n2"]);
    complete(bed, Duration::from_mins(5));
    kills += killer.end(&matrix, "in-place", "migrated");
    // Some operations are too quick to be seen between two looks.
    assert!(kills >= 10, "only {kills} kills");
    unchanged(&before);
    prober.stop().unwrap();
    expect_migrated(bed);
}
