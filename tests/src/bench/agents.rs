//! Simulated agents: each decides as the real one does, speaks the real protocol, and has a host on which everything has just been done.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use flannel_migration_agent::{
    decide::{Felix, Next, Observed, decide},
    journal::{Entry, Journal},
    news::News,
};
use flannel_migration_protocol::{Adopted, Grant, Network, NodeView, State};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api,
    api::{PartialObjectMeta, Patch, PatchParams},
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::sync::{oneshot, watch};

use super::objects;
use crate::probe;

/// What one node went through.
#[derive(Debug, Clone, Copy, Default)]
pub struct Course {
    /// Its lease was seen.
    pub leased: Option<Instant>,
    /// Its lease was gone, the node migrated.
    pub released: Option<Instant>,
    /// What its agent took of the time between: from seeing that it is its turn to having told what it did.
    pub agent: Duration,
}

/// The courses of all nodes that had a lease, by name.
pub type Courses = BTreeMap<String, Course>;

/// All simulated agents, on a thread of their own.
pub struct Agents {
    courses: Arc<Mutex<Courses>>,
    /// How long each waits for Calico, in milliseconds.
    pace: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Agents {
    /// Starts; every node that there is gets its agent, each with so many pods to adopt. `scratch` holds no file in the end.
    pub fn start(kubeconfig: &Path, pods: u32, scratch: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(probe::client(kubeconfig))?;
        // An entry of a node that nothing was done on; it is never written.
        let blank = Journal::open(&scratch.join("journal"), "blank").context("can't make a journal")?.entry;
        let courses: Arc<Mutex<Courses>> = Arc::default();
        let pace = Arc::new(AtomicU64::new(0));
        let (shared, paced) = (Arc::clone(&courses), Arc::clone(&pace));
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let seen: Api<PartialObjectMeta<Node>> = Api::all(client);
            let all = All { nodes: seen.clone(), pods, blank, courses: shared, pace: paced };
            runtime.block_on(async {
                tokio::select! { () = all.serve(seen) => {}, _ = stopped => {} }
            });
        });
        Ok(Self { courses, pace, stop: Some(stop), thread: Some(thread) })
    }

    /// Has every agent wait so long for Calico from now on.
    pub fn pace(&self, pace: Duration) {
        self.pace.store(u64::try_from(pace.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What became of the nodes so far.
    #[must_use]
    pub fn courses(&self) -> Courses {
        lock(&self.courses).clone()
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(courses: &Mutex<Courses>) -> MutexGuard<'_, Courses> {
    courses.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A node as the watch tells it.
#[derive(Debug, Clone)]
struct Seen {
    view: NodeView,
    version: String,
    at: Instant,
}

struct All {
    nodes: Api<PartialObjectMeta<Node>>,
    pods: u32,
    blank: Entry,
    courses: Arc<Mutex<Courses>>,
    pace: Arc<AtomicU64>,
}

impl All {
    async fn serve(&self, seen: Api<PartialObjectMeta<Node>>) {
        let events = watcher(seen, watcher::Config::default()).default_backoff().applied_objects();
        let mut events = std::pin::pin!(events);
        let mut agents: HashMap<String, watch::Sender<Seen>> = HashMap::new();
        while let Some(event) = events.next().await {
            // The watch goes on by itself.
            let Ok(node) = event else { continue };
            let Some(name) = node.metadata.name else { continue };
            let (labels, annotations) =
                (node.metadata.labels.unwrap_or_default(), node.metadata.annotations.unwrap_or_default());
            let seen = Seen {
                view: NodeView::parse(&labels, &annotations),
                version: node.metadata.resource_version.unwrap_or_default(),
                at: Instant::now(),
            };
            self.note(&name, &seen);
            if let Some(agent) = agents.get(&name) {
                agent.send_replace(seen);
            } else {
                let (sender, receiver) = watch::channel(seen);
                tokio::spawn(self.agent(&name).run(receiver));
                agents.insert(name, sender);
            }
        }
    }

    fn agent(&self, name: &str) -> Agent {
        Agent {
            name: name.to_owned(),
            nodes: self.nodes.clone(),
            entry: Entry { node: name.to_owned(), ..self.blank.clone() },
            adopted: adopted(name, self.pods),
            written: String::new(),
            status: None,
            courses: Arc::clone(&self.courses),
            pace: Arc::clone(&self.pace),
        }
    }

    fn note(&self, name: &str, seen: &Seen) {
        let mut courses = lock(&self.courses);
        if !seen.view.lease.is_absent() {
            courses.entry(name.to_owned()).or_default().leased.get_or_insert(seen.at);
        } else if seen.view.state.get() == Some(&State::Calico)
            && let Some(course) = courses.get_mut(name)
        {
            course.released.get_or_insert(seen.at);
        }
    }
}

/// The pods that a node's agent takes over.
fn adopted(name: &str, pods: u32) -> Vec<Adopted> {
    let number = objects::number(name).unwrap_or(0);
    (0..pods)
        .map(|pod| Adopted {
            sandbox: format!("{number:032x}{pod:032x}"),
            // The first two are the device's and the bridge's.
            ip: vec![IpAddr::V4(objects::pod_address(number, pod + 2))],
            namespace: "default".into(),
            pod: format!("app-{number}-{pod}"),
            uid: format!("{number:08x}-0000-4000-8000-{pod:012x}"),
        })
        .collect()
}

struct Agent {
    name: String,
    nodes: Api<PartialObjectMeta<Node>>,
    entry: Entry,
    adopted: Vec<Adopted>,
    /// The version that was written last, which the watch may not have told yet.
    written: String,
    status: Option<&'static str>,
    courses: Arc<Mutex<Courses>>,
    pace: Arc<AtomicU64>,
}

impl Agent {
    async fn run(mut self, mut seen: watch::Receiver<Seen>) {
        loop {
            let now = seen.borrow_and_update().clone();
            let (at, leased) = (now.at, !now.view.lease.is_absent());
            if self.step(now).await && leased {
                lock(&self.courses).entry(self.name.clone()).or_default().agent += at.elapsed();
            }
            if seen.changed().await.is_err() {
                return;
            }
        }
    }

    /// Does what is to be done; whether it was anything.
    async fn step(&mut self, seen: Seen) -> bool {
        let network = seen.view.network.get().copied();
        let observed = Observed {
            view: seen.view.clone(),
            flanneld: false,
            flannel_here: true,
            flannel_files: false,
            felix: if network == Some(Network::Calico) { Felix::Ready } else { Felix::Gone },
            kept_in_use: false,
            now: Timestamp::now(),
        };
        match decide(&self.entry, &observed) {
            Next::Prepare(grant) => {
                self.begin(*grant);
                self.enter(&seen, State::Preparing, "Preparing").await;
                self.enter(&seen, State::Prepared, "Prepared").await;
            }
            Next::Withdraw => self.enter(&seen, State::Flannel, "LeaseWithdrawn").await,
            Next::Switch => {
                self.entry.switched = Some(Timestamp::now());
                self.enter(&seen, State::Switching, "Switching").await;
                self.enter(&seen, State::Verifying, "Switched").await;
            }
            Next::Verify => {
                tokio::time::sleep(Duration::from_millis(self.pace.load(Ordering::Relaxed))).await;
                self.enter(&seen, State::Calico, "Migrated").await;
            }
            Next::Revert(reason, _) => self.enter(&seen, State::Reverting, reason).await,
            Next::RollBack(grant) => {
                self.begin(*grant);
                self.enter(&seen, State::Reverting, "RollbackGranted").await;
            }
            Next::Undo => self.enter(&seen, State::Flannel, "Reverted").await,
            Next::Answer(grant) => {
                self.begin(*grant);
                self.publish(&seen).await;
            }
            // A write that met another's is made again.
            Next::Wait(_) if self.entry.epoch.is_some() && !self.told(&seen.view) => {
                self.publish(&seen).await;
            }
            Next::Wait(_) | Next::Join | Next::LetGo | Next::Sweep | Next::Finish => return false,
        }
        true
    }

    fn begin(&mut self, grant: Grant) {
        self.entry.epoch = Some(grant.epoch);
        self.entry.fence = grant.fence;
        self.entry.grant = Some(grant);
    }

    async fn enter(&mut self, seen: &Seen, state: State, reason: &str) {
        self.entry.state = state;
        self.entry.since = Timestamp::now();
        reason.clone_into(&mut self.entry.reason);
        self.publish(seen).await;
    }

    fn told(&self, view: &NodeView) -> bool {
        view.state.get() == Some(&self.entry.state)
            && view.report.get().is_some_and(|report| report.epoch == self.entry.epoch)
    }

    /// Writes as the real agent does, all in one patch with the version as precondition.
    async fn publish(&mut self, seen: &Seen) {
        let shown = matches!(self.entry.state, State::Verifying | State::Calico | State::Reverting);
        let news = News::of(&self.entry, "", None).with_adopted(shown.then(|| self.adopted.clone()));
        let status = news.condition().0;
        let turned = self.status.replace(status) != Some(status);
        let patch = news.patch(newest(&seen.version, &self.written), Timestamp::now(), turned);
        let parameters = PatchParams::default();
        // Where somebody wrote in between, the watch brings it, and with it the next try.
        if let Ok(written) = self.nodes.patch_status(&self.name, &parameters, &Patch::Strategic(patch)).await
        {
            self.written = written.metadata.resource_version.unwrap_or_default();
        }
    }
}

/// Versions of one kind of object are comparable numbers.
fn newest<'a>(seen: &'a str, written: &'a str) -> &'a str {
    let number = |version: &str| version.parse::<u64>().unwrap_or(0);
    if number(written) > number(seen) { written } else { seen }
}
