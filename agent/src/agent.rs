//! The loop: look, decide, do one step, tell. Woken by the node's watch, by changes of the CNI directory, and by the clock.

use std::path::Path;
use std::time::Duration;

use flannel_migration_protocol::{Grant, HostFacts, Network, State};
use flannel_migration_telemetry::Probes;
use notify::Watcher as _;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::args::Args;
use crate::decide::{Next, decide};
use crate::host::{cni, facts};
use crate::inventory::Known;
use crate::journal::{Entry, Journal};
use crate::metrics::Metrics;
use crate::node::{OwnNode, PATIENCE, Seen};
use crate::steps::{self, Site};
use crate::{observe, work};

/// How often to look when nothing happens: processes and Felix give no event.
const BUSY: Duration = Duration::from_millis(150);
/// At rest: kernel settings and what others do to the host give no event either.
const IDLE: Duration = Duration::from_secs(10);
/// The end of a connection gives no event, and neither does the start of Felix on a node that joined.
const SOON: Duration = Duration::from_millis(500);
/// How long the switch waits to be announced. It needs no API.
const ANNOUNCE: Duration = Duration::from_secs(2);

/// The agent of one node.
pub struct Agent {
    args: Args,
    site: Site,
    journal: Journal,
    node: OwnNode,
    waiting: &'static str,
    /// Whether something was decided and not told yet.
    untold: bool,
    /// What is seen of the host while nothing is changed there.
    host: Option<HostFacts>,
    /// The last step's error.
    trouble: Option<String>,
    troubled: bool,
    metrics: Metrics,
    probes: Probes,
}

impl Agent {
    /// Opens the journal and connects.
    pub async fn new(args: Args, metrics: Metrics, probes: Probes) -> anyhow::Result<Self> {
        let site = args.site();
        let mut journal = Journal::open(&args.state_dir, &args.node_name)?;
        work::after_boot(&mut journal, &site)?;
        let node = OwnNode::connect(&args.node_name, &metrics.calls).await?;
        metrics.see(&journal.entry);
        info!(node = args.node_name, state = %journal.entry.state, version = env!("CARGO_PKG_VERSION"), "started");
        Ok(Self {
            args,
            site,
            journal,
            node,
            waiting: "",
            untold: false,
            host: None,
            trouble: None,
            troubled: false,
            metrics,
            probes,
        })
    }

    /// Runs until cancelled. A step that has begun is ended first.
    pub async fn run(mut self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let mut seen = self.node.watch();
        let (sender, mut changes) = mpsc::channel(1);
        let _watcher = watch_configs(&self.args.cni_config_dir, sender);
        loop {
            self.probes.beat();
            let now = seen.borrow_and_update().clone();
            let known = now.is_some();
            let joins = now.as_ref().is_some_and(|now| now.view.network.get() == Some(&Network::Calico));
            let again = self.step(now).await;
            // Ready: the node is seen, and what was last to be said of it was said.
            self.probes.set_ready(known && !self.troubled);
            let pause = match (again, self.journal.entry.state) {
                (true, _) => Duration::ZERO,
                (false, State::Prepared | State::Verifying | State::Reverting) => BUSY,
                (false, State::Flannel) if joins => SOON,
                (false, _) if !self.journal.entry.kept.is_empty() => SOON,
                (false, _) if self.node.has_words_left() => PATIENCE,
                _ => IDLE,
            };
            tokio::select! {
                () = shutdown.cancelled() => break,
                result = seen.changed() => result?,
                () = tokio::time::sleep(pause) => {}
                Some(()) = changes.recv() => self.configs_changed(),
            }
        }
        info!(node = self.site.node, state = %self.journal.entry.state, "stopped");
        Ok(())
    }

    // Whether to go on at once.
    async fn step(&mut self, seen: Option<Seen>) -> bool {
        let known = seen.is_some();
        let seen = seen.unwrap_or_default();
        let (view, journal) = (seen.view.clone(), self.journal.clone());
        let (site, directory) = (self.site.clone(), self.args.cni_config_dir.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let host =
                (journal.entry.state == State::Flannel).then(|| facts::look(Path::new(facts::PLUGINS)));
            (observe::observe(view, &journal, &site, &directory), host)
        });
        let Ok((observed, host)) = looked.await else {
            return false;
        };
        self.host = host;
        // Before the node was seen, only what needs no word from the coordinator is gone on with.
        let next = match decide(&self.journal.entry, &observed) {
            next if known || next == Next::Switch && self.journal.entry.state == State::Switching => next,
            _ => return false,
        };
        let managed = !observed.view.network.is_absent() || observed.flannel_here || self.journal.exists();
        if let Next::Wait(what) = next {
            if self.waiting != what {
                self.waiting = what;
                info!(node = self.site.node, epoch = self.epoch(), state = %self.journal.entry.state, step = what, "waiting");
            }
            if managed {
                self.publish(&seen, what).await;
            }
            return false;
        }
        self.waiting = "";
        if self.untold {
            // No state is passed over, and no reason.
            self.publish(&seen, "").await;
        }
        let what = |entry: &Entry| (entry.state, entry.epoch, entry.reason.clone());
        let (before, told) = (self.journal.entry.state, what(&self.journal.entry));
        let (finished, let_go) = (next == Next::Finish, next == Next::LetGo);
        let done = self.act(next, &seen).await;
        // Said once, however often it is tried again.
        let trouble = done.as_ref().err().map(|error| steps::chain(&**error));
        if let Some(error) = &trouble
            && trouble != self.trouble
        {
            warn!(node = self.site.node, epoch = self.epoch(), state = %self.journal.entry.state, error, "not done");
        }
        if trouble.is_some() {
            self.metrics.step_failed();
            self.recall();
        }
        self.trouble = trouble;
        let entry = &self.journal.entry;
        // After the end the journal is a new one, and says nothing about the node.
        if entry.state != before && !finished {
            info!(node = self.site.node, epoch = self.epoch(), from = %before, state = %entry.state, step = "enter", reason = entry.reason, why = entry.message, "entered");
        }
        self.metrics.see(entry);
        let news = what(entry) != told;
        if done.is_ok() && (news || let_go) {
            // What is waited for next is known in a moment, and told in the same write.
            self.untold = news && !finished;
            return true;
        }
        if self.journal.exists() || managed && self.trouble.is_some() {
            let doing = self.doing("");
            self.publish(&seen, &doing).await;
        }
        false
    }

    // What went wrong stays what is said while it is tried again: words that change with each try would wait for each other.
    fn doing(&self, step: &str) -> String {
        self.trouble.as_ref().map_or_else(|| step.to_owned(), |trouble| format!("not done: {trouble}"))
    }

    async fn act(&mut self, next: Next, seen: &Seen) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        match next {
            Next::Wait(_) => {}
            Next::Prepare(grant) => {
                self.begin(&grant);
                self.journal.enter(State::Preparing, "Preparing", "")?;
                self.metrics.see(&self.journal.entry);
                let doing = self.doing("examining the node");
                self.publish(seen, &doing).await;
                let pods = self.node.pods().await?;
                self.blocking(move |journal, site| work::prepare(journal, site, &grant, Some(&pods))).await?;
            }
            Next::Withdraw => {
                self.journal.entry.captured = None;
                self.journal.entry.evict.clear();
                self.journal.enter(
                    State::Flannel,
                    "LeaseWithdrawn",
                    "the coordinator took the lease back",
                )?;
            }
            Next::Switch => self.switch(seen).await?,
            Next::Verify => {
                let lost = self.blocking(work::verify).await?;
                self.metrics.lost(lost);
            }
            Next::Revert(reason, message) => self.journal.enter(State::Reverting, reason, &message)?,
            Next::RollBack(grant) => {
                self.begin(&grant);
                let why = "the node goes back to flannel by request";
                self.journal.enter(State::Reverting, "RollbackGranted", why)?;
            }
            Next::Undo => {
                let (reason, message) =
                    (self.journal.entry.reason.clone(), self.journal.entry.message.clone());
                self.blocking(move |journal, site| work::undo(journal, site, &reason, &message)).await?;
            }
            Next::Answer(grant) => {
                self.begin(&grant);
                let state = self.journal.entry.state;
                self.journal.enter(state, "NothingToDo", "the node is already there")?;
            }
            Next::Join => {
                self.journal.enter(State::Calico, "Joined", "the node never had flannel; Calico is ready")?;
            }
            Next::LetGo => self.blocking(|journal, _| work::let_go(journal)).await?,
            Next::Sweep => {
                let directory = self.args.cni_config_dir.clone();
                self.blocking(move |_, site| work::sweep(site, &directory)).await?;
            }
            Next::Finish => {
                if !self.journal.entry.kept.is_empty() {
                    self.blocking(|journal, _| work::let_go(journal)).await?;
                }
                self.blocking(|journal, _| work::forget_peers(journal)).await?;
                self.journal.remove()?;
                self.journal = Journal::open(&self.args.state_dir, &self.args.node_name)?;
                work::after_boot(&mut self.journal, &self.site)?;
                info!(node = self.site.node, "the migration has ended; nothing is left on the node");
            }
        }
        Ok(())
    }

    async fn switch(&mut self, seen: &Seen) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.journal.entry.state != State::Switching {
            self.journal.entry.switched = Some(jiff::Timestamp::now());
            self.journal.enter(State::Switching, "Switching", "")?;
            self.metrics.see(&self.journal.entry);
        }
        let closed = self.blocking(work::close_flannel).await;
        // Those who watch want to know; the node doesn't depend on it.
        let doing = self.doing("moving pods");
        drop(timeout(ANNOUNCE, self.publish(seen, &doing)).await);
        let done = match closed {
            Ok(()) => {
                let pods: Option<Vec<Known>> = match timeout(ANNOUNCE, self.node.pods()).await {
                    Ok(Ok(pods)) => Some(pods),
                    _ => None,
                };
                self.blocking(move |journal, site| work::switch(journal, site, pods.as_deref())).await
            }
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => Ok(()),
            // Undoing needs the journal as well. Nothing is changed until it can be written; then it is gone on with.
            Err(error @ steps::Error::Journal(_)) => Err(error.into()),
            Err(error) => {
                Ok(self.blocking(move |journal, site| work::back_out(journal, site, &error)).await?)
            }
        }
    }

    fn begin(&mut self, grant: &Grant) {
        let entry = &mut self.journal.entry;
        entry.epoch = Some(grant.epoch);
        entry.fence = grant.fence;
        entry.switched = None;
        entry.grant = Some(grant.clone());
    }

    // Off the runtime's threads. The journal goes along and comes back, changed or not.
    async fn blocking<F, T>(&mut self, work: F) -> Result<T, steps::Error>
    where
        F: FnOnce(&mut Journal, &Site) -> Result<T, steps::Error> + Send + 'static,
        T: Send + 'static,
    {
        let (mut journal, site) = (self.journal.clone(), self.site.clone());
        let span =
            tracing::info_span!("step", node = site.node, epoch = self.epoch(), state = %journal.entry.state);
        let ended = tokio::task::spawn_blocking(move || {
            let result = span.in_scope(|| work(&mut journal, &site));
            (journal, result)
        });
        match ended.await {
            Ok((journal, result)) => {
                self.journal = journal;
                result
            }
            // Only a panic or the runtime's end leads here; what was done until then is in the journal on disk.
            Err(error) => {
                self.journal = Journal::open(&self.args.state_dir, &self.args.node_name)?;
                Err(steps::Error::Unfit("StepDied", error.to_string()))
            }
        }
    }

    // What isn't durable hasn't happened: after a failure, what is on disk is gone on from; unless somebody took it away.
    fn recall(&mut self) {
        let opened = Journal::open(&self.args.state_dir, &self.args.node_name).map_err(steps::Error::from);
        let opened = opened.and_then(|mut journal| {
            work::after_boot(&mut journal, &self.site)?;
            Ok(journal)
        });
        match opened {
            Ok(journal) if journal.exists() || self.journal.entry.progress.is_empty() => {
                self.journal = journal;
            }
            _ => {}
        }
    }

    async fn publish(&mut self, seen: &Seen, step: &str) {
        self.untold = false;
        match self.node.publish(seen, &self.journal.entry, step, self.host.as_ref()).await {
            Ok(()) => self.troubled = false,
            Err(error) => {
                if !self.troubled {
                    warn!(
                        node = self.site.node,
                        epoch = self.epoch(),
                        error = steps::chain(&error),
                        "not told; tried again"
                    );
                }
                self.troubled = true;
            }
        }
    }

    fn epoch(&self) -> u64 {
        self.journal.entry.epoch.map_or(0, flannel_migration_protocol::Epoch::get)
    }

    fn configs_changed(&self) {
        let configs = cni::configs(&self.args.cni_config_dir).unwrap_or_default();
        let files: Vec<_> = configs.iter().map(|config| config.path.display().to_string()).collect();
        debug!(node = self.site.node, files = files.join(" "), "CNI configs changed");
        let moved = matches!(self.journal.entry.state, State::Verifying | State::Calico);
        if let Some(first) = configs.first().filter(|first| moved && first.is_anothers()) {
            let file = first.path.display().to_string();
            warn!(
                node = self.site.node,
                epoch = self.epoch(),
                state = %self.journal.entry.state,
                step = "configs",
                file,
                "another CNI config comes before Calico's: new pods get its network"
            );
        }
        if moved && configs.iter().any(cni::Config::is_flannels) {
            warn!(
                node = self.site.node,
                epoch = self.epoch(),
                state = %self.journal.entry.state,
                step = "configs",
                "flannel's CNI config came back: something still installs flannel here"
            );
        }
    }
}

// Without it, the clock still wakes the loop.
fn watch_configs(directory: &Path, sender: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // One wake-up is enough for any number of events.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            let _ = sender.try_send(());
        }
    })
    .and_then(|mut watcher| {
        watcher.watch(directory, notify::RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    watcher.map_err(|error| warn!(error = error.to_string(), "the CNI directory isn't watched")).ok()
}
