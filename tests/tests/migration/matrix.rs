//! Many faults on one cluster, one after another: a node is met at an exact moment of its way.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use flannel_migration_tests::{
    bed::{Bed, node},
    migration::{self, LEASE_LABEL, NETWORK_LABEL, PATIENCE, STATE_LABEL},
    probe::{Options, Prober, Workloads, deploy_to},
    run,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{AGENT, items, label, look, rollback::command};

/// How long it may take until an agent is where it is waited for.
const PASSED: Duration = Duration::from_mins(1);
/// How often it is waited for: some moments last less than a turn of the processor does on a machine with much to do.
const TRIES: usize = 4;

/// Path of a node's journal, as seen from the machine.
pub fn journal(bed: &Bed, node: &str) -> PathBuf {
    node::stable_root(bed, node).join("var/lib/cni/flannel-migration/journal.json")
}

/// What a journal says, with the notes beside it that belong to it; nothing while there is none.
pub fn read(path: &Path) -> Value {
    let file = |path: &Path| -> Value {
        fs::read_to_string(path).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    };
    let (mut entry, notes) = (file(path), file(&path.with_file_name("progress.json")));
    if entry.is_object() && notes["writes"] == entry["writes"] {
        entry["progress"] = notes["progress"].clone();
    }
    entry
}

/// The operations that a journal tells of, with how far each got.
pub fn progress(entry: &Value) -> Vec<(String, String)> {
    let pairs = entry["progress"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    pairs.iter().map(|pair| (text(&pair[0]), text(&pair[1]))).collect()
}

/// The agent's process on a node, by the node's network namespace.
pub fn agent_process(netns: &str) -> Option<i32> {
    let inside = run::output(&mut run::command("ip", &["netns", "pids", netns])).ok()?;
    inside.lines().filter_map(|pid| pid.parse().ok()).find(|pid: &i32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.starts_with(b"/usr/local/bin/agent\0") || arguments.starts_with(b"/usr/bin/agent\0")
    })
}

/// Waits, and says in vain what both programs logged.
pub fn wait(bed: &Bed, what: &str, limit: Duration, holds: impl FnMut() -> anyhow::Result<bool>) {
    run::wait_for(what, limit, holds).unwrap_or_else(|error| panic!("{error:#}\n{}", logs(bed)));
}

fn logs(bed: &Bed) -> String {
    let mut text = migration::coordinator_log(bed).unwrap_or_default();
    for node in &bed.nodes {
        let name = &node.shape.name;
        let _ = write!(text, "--- agent of {name}\n{}", migration::agent_log(bed, name).unwrap_or_default());
    }
    text
}

/// Waits until a node is at rest; returns on which network.
pub fn rest(bed: &Bed, node: &str, limit: Duration) -> String {
    let mut at = String::new();
    wait(bed, &format!("{node} is at rest"), limit, || {
        let now = bed.get(&["node", node])?;
        at = label(&now, STATE_LABEL);
        let settled = label(&now, LEASE_LABEL).is_empty() && label(&now, NETWORK_LABEL) == at;
        Ok(settled && ["flannel", "calico"].contains(&at.as_str()))
    });
    at
}

/// Waits until a node is at rest on this network.
pub fn rest_on(bed: &Bed, node: &str, network: &str) {
    wait(bed, &format!("{node} is at rest on {network}"), Duration::from_mins(4), || {
        let now = bed.get(&["node", node])?;
        Ok(label(&now, STATE_LABEL) == network && label(&now, LEASE_LABEL).is_empty())
    });
}

/// The workloads and their prober, then a migration of which nothing is started before `command(bed, &["resume"])`; the
/// coordinator is on `home`.
pub fn begin(bed: &Bed, home: &str, environment: &[(&str, &str)]) -> Prober {
    let prober = begin_with(bed, environment, |job| {
        job["metadata"]["annotations"]["flannel-migration/request"] = "pause".into();
        job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] = home.into();
    });
    wait(bed, "the cluster is prepared", Duration::from_mins(2), || {
        Ok(items(&bed.get(&["nodes"])?).iter().all(|node| label(node, NETWORK_LABEL) == "flannel"))
    });
    prober
}

/// The workloads and their prober, then the manifests with the Job changed by `edit`; waits until the agents run.
pub fn begin_with(bed: &Bed, environment: &[(&str, &str)], edit: impl FnOnce(&mut Value)) -> Prober {
    deploy_to(&bed.plan.kubeconfig(), &Workloads::default(), Duration::from_mins(2)).unwrap();
    // Late isn't lost: a machine with many clusters answers late.
    let options = Options { interval: Duration::from_millis(20), timeout: PATIENCE, ..Options::default() };
    let prober = Prober::start(bed.site().unwrap(), options).unwrap();
    migration::apply_with(bed, environment, edit).unwrap();
    let wanted = bed.nodes.len();
    wait(bed, "the agents run", Duration::from_mins(2), || {
        let pods = bed.get(&["-n", "kube-system", "pods", "-l", &format!("k8s-app={AGENT}")])?;
        Ok(items(&pods).iter().filter(|pod| pod["status"]["phase"] == "Running").count() == wanted)
    });
    prober
}

/// A person who has looked need not wait for the next attempt.
pub fn forget_failures(bed: &Bed, node: &str) {
    bed.kubectl(&["annotate", "node", node, "flannel-migration/failures-"]).unwrap();
}

/// Migrates a node back, if it isn't flannel's.
pub fn back_to_flannel(bed: &Bed, node: &str) {
    if label(&look(bed, node), STATE_LABEL) != "flannel" {
        command(bed, &["rollback", node]);
        rest_on(bed, node, "flannel");
    }
    forget_failures(bed, node);
}

/// A new pod in place of a node's agent: the kubelet would wait longer before each further restart of the old one.
pub fn delete_agent(bed: &Bed, node: &str) {
    let (selector, field) = (format!("k8s-app={AGENT}"), format!("spec.nodeName={node}"));
    let delete = ["-n", "kube-system", "delete", "pod", "--grace-period=0", "--force", "-l", &selector];
    bed.kubectl(&[&delete[..], &["--field-selector", &field]].concat()).unwrap();
}

/// The same; waits for its process. `old`: that of the old one, if it isn't there any more.
pub fn replace_agent(bed: &Bed, node: &str, old: Option<i32>) -> Option<i32> {
    let netns = bed.plan.netns(node);
    let old = old.or_else(|| agent_process(&netns));
    delete_agent(bed, node);
    let mut process = None;
    let _ = run::wait_for("the agent is back", Duration::from_mins(1), || {
        process = agent_process(&netns).filter(|pid| Some(*pid) != old);
        Ok(process.is_some())
    });
    process
}

/// An agent that was stopped at the very moment when its journal was as wanted.
pub struct Met {
    pid: Pid,
    /// State and last operation, as the journal tells them.
    pub at: String,
}

impl Met {
    /// Lets it go on.
    pub fn go_on(&self) {
        kill(self.pid, Signal::SIGCONT).unwrap();
    }

    /// Lets it tell its state, stops it again, and waits until the coordinator has answered with this network.
    pub fn answered(&self, bed: &Bed, node: &str, state: &str, network: &str) {
        self.go_on();
        wait(bed, &format!("{node} says {state}"), Duration::from_mins(1), || {
            Ok(label(&bed.get(&["node", node])?, STATE_LABEL) == state)
        });
        kill(self.pid, Signal::SIGSTOP).unwrap();
        wait(bed, &format!("the coordinator lets {network} come"), Duration::from_mins(1), || {
            Ok(label(&bed.get(&["node", node])?, NETWORK_LABEL) == network)
        });
    }

    /// Ends it as it is.
    pub fn kill(&self) {
        kill(self.pid, Signal::SIGKILL).unwrap();
    }
}

/// Sends a node on its way, or back, and stops its agent as soon as its journal is in this state, and `op`, if one is given, is begun or
/// done; `!op`: is neither.
pub fn meet(bed: &Bed, node: &str, state: &str, op: Option<&str>) -> Met {
    let back = state == "reverting";
    let met = (0..TRIES).find_map(|_| {
        if back {
            command(bed, &["resume", node]);
            rest_on(bed, node, "calico");
        } else {
            back_to_flannel(bed, node);
        }
        let ambush = Ambush::lay(bed, node, state, op);
        command(bed, &[if back { "rollback" } else { "resume" }, node]);
        ambush.meet()
    });
    met.unwrap_or_else(|| panic!("the agent was never met in {state}\n{}", logs(bed)))
}

/// Lies in wait for a node's agent.
struct Ambush {
    thread: JoinHandle<Option<Met>>,
    over: Arc<AtomicBool>,
}

impl Ambush {
    fn lay(bed: &Bed, node: &str, state: &str, op: Option<&str>) -> Self {
        let (path, netns) = (journal(bed, node), bed.plan.netns(node));
        let mut process = None;
        wait(bed, "the agent runs", Duration::from_mins(1), || {
            process = agent_process(&netns);
            Ok(process.is_some())
        });
        let (pid, state, op) = (Pid::from_raw(process.unwrap()), state.to_owned(), op.map(str::to_owned));
        let over = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&over);
        let thread = thread::spawn(move || {
            while !given_up.load(Ordering::Relaxed) {
                let entry = read(&path);
                let ops = progress(&entry);
                let there = |op: &str| ops.iter().any(|(name, _)| name == op);
                let reached = op.as_deref().is_none_or(|op| match op.strip_prefix('!') {
                    Some(op) => !there(op),
                    None => there(op),
                });
                if entry["state"] != state.as_str() || !reached {
                    // A rename gives no event that is faster than looking.
                    thread::sleep(Duration::from_micros(200));
                    continue;
                }
                kill(pid, Signal::SIGSTOP).ok()?;
                let entry = read(&path);
                let last = progress(&entry).pop().map(|(name, how)| format!(", {name} {how}"));
                let at = format!("{}{}", entry["state"].as_str().unwrap_or("?"), last.unwrap_or_default());
                return Some(Met { pid, at });
            }
            None
        });
        Self { thread, over }
    }

    /// Waits until it is there; in vain when it was too quick for two looks.
    fn meet(self) -> Option<Met> {
        let limit = Instant::now() + PASSED;
        while !self.thread.is_finished() && Instant::now() < limit {
            thread::sleep(Duration::from_millis(5));
        }
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// A moment of a node's way: the state, an operation of it, and what the coordinator has answered.
pub struct Moment(pub &'static str, pub Option<&'static str>, pub Option<&'static str>);

impl Moment {
    /// Whether it is on the way back.
    pub fn back(&self) -> bool {
        self.0 == "reverting"
    }

    /// Sends a node that is flannel's on its way, by this strategy, and stops its agent at this moment; says exactly where. The node isn't
    /// tried again after it.
    pub fn reach(&self, bed: &Bed, node: &str, strategy: &str) -> (Met, String) {
        let Self(state, op, answer) = self;
        let wanted = format!("flannel-migration/strategy={strategy}");
        bed.kubectl(&["annotate", "node", node, "--overwrite", &wanted]).unwrap();
        let met = meet(bed, node, state, *op);
        let mut at = format!("{strategy}, {}", met.at);
        if let Some(network) = answer {
            met.answered(bed, node, state, network);
            let _ = write!(at, ", network {network}");
        }
        if !self.back() {
            command(bed, &["pause", node]);
        }
        (met, at)
    }
}

/// The node's host is of this network, and nothing of the other is left.
pub fn whole(bed: &Bed, node: &str, network: &str) {
    let script = "ls /etc/cni/net.d; ip -o link | cut -d: -f2 | cut -d@ -f1";
    let (own, other): (&[&str], &[&str]) = match network {
        "flannel" => (&["10-flannel.conflist", "flannel.1"], &["10-calico.conflist", "vxlan.calico", "cali"]),
        _ => (&["10-calico.conflist", "vxlan.calico"], &["10-flannel.conflist", "flannel.1", "cni0"]),
    };
    let mut found = String::new();
    run::wait_for(&format!("{node} is {network}'s alone"), Duration::from_mins(1), || {
        found = bed.exec(node, &["sh", "-c", script])?;
        let is = |what: &&str| found.split_whitespace().any(|word| word.starts_with(*what));
        Ok(own.iter().all(&is) && !other.iter().any(is))
    })
    .unwrap_or_else(|error| panic!("{error:#}:\n{found}\n{}", logs(bed)));
    let now = look(bed, node);
    assert_ne!(now["spec"]["unschedulable"], json!(true), "{node} is cordoned");
}
