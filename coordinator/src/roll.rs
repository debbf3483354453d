//! The roll: looks, decides, starts what is decided, one task per node at most, and waits for the next change. All memory is in the
//! cluster; what is kept here only saves work.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_protocol::Request;
use jiff::Timestamp;
use kube::runtime::events::EventType;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tracing::{Level, debug, enabled, error, info, warn};

use crate::api;
use crate::cluster::Changed;
use crate::node::{Error, Steps};
use crate::plan::{Action, Alarm, End, FLANNEL_LEAVING, Moment, Planner, Waiting};
use crate::{orphans, selectors};

/// Looked again this often even if nothing seems to change: what is overdue shows only by time passing.
const SAFETY_TICK: Duration = Duration::from_secs(10);
/// A step that failed is decided anew after this pause at the earliest.
const RETRY_PAUSE: Duration = Duration::from_secs(2);
/// After a look, so many times as long as it took isn't looked again: whatever changes how fast, looking takes a twentieth of the time
/// at most.
const REST_AFTER_LOOK: u32 = 19;
/// But not longer than this: a look may take long for other reasons than its own work.
const LONGEST_REST: Duration = Duration::from_millis(200);
/// So many nodes that flannel doesn't leave are looked at each time.
const LOOKED_AT: usize = 8;

/// Whether the administrator wants no more nodes migrated, and none prepared.
#[must_use]
pub fn winds_down(request: Option<Request>) -> bool {
    matches!(request, Some(Request::Abort | Request::Rollback))
}

/// Takes all nodes through; returns when each is where it is to be. `None`: the cluster was wound down without being prepared, and is to be
/// migrated after all.
pub async fn roll(steps: &Arc<Steps>, own: Option<&str>, winding: bool) -> Result<Option<End>, api::Error> {
    let (mut changes, mut following) = (steps.nodes.changes(), steps.nodes.follow());
    let mut asked = steps.requests.changes();
    let mut tasks: JoinSet<(String, Result<(), Error>)> = JoinSet::new();
    let mut planner = Planner::new(&steps.policy, own);
    let mut told: Told = Told::default();
    let started = Instant::now();
    let mut tied = Instant::now();
    loop {
        let due = !winding && tied.elapsed() > SAFETY_TICK;
        if due {
            tied = Instant::now();
            tie(steps).await;
        }
        let looking = Instant::now();
        match following.take() {
            Changed::All(all) => planner.see_all(&all),
            Changed::Some(nodes) => nodes.into_iter().for_each(|(name, node)| planner.see(name, node)),
        }
        let request = steps.requests.now();
        let now = Moment { wall: Timestamp::now(), own: started.elapsed() };
        planner.look(request, now);
        let held = winding && !winds_down(request);
        let actions = if held { Vec::new() } else { planner.start() };
        let looked = looking.elapsed();
        if due {
            end_orphans(steps, &planner, now).await;
        }
        told.tell(steps, &planner).await;
        if let Some(end) = planner.end() {
            info!(
                nodes = planner.total(),
                on_calico = planner.done(),
                seconds = started.elapsed().as_secs_f32(),
                step = "roll",
                ?end,
                "every node is where it is to be"
            );
            return Ok(Some(end));
        }
        if held && planner.busy().is_empty() {
            return Ok(None);
        }
        for action in actions {
            tasks.spawn(take_through(Arc::clone(steps), action));
        }
        // Where nodes change faster than can be looked at, what shares this task, the renewal of the leadership above all, has its turn now.
        sleep((looked * REST_AFTER_LOOK).min(LONGEST_REST)).await;
        let pause = planner.until().map_or(SAFETY_TICK, |at| until(now.wall, at).min(SAFETY_TICK));
        let mut ended = tokio::select! {
            alive = changes.changed() => match alive {
                Ok(()) => None,
                Err(_) => return Err(over("watch the nodes")),
            },
            ended = tasks.join_next(), if !tasks.is_empty() => ended,
            alive = asked.changed() => match alive {
                Ok(()) => None,
                Err(_) => return Err(over("watch the Job")),
            },
            () = sleep(pause) => None,
        };
        // All that have ended by now: one look is enough for them.
        while let Some(one) = ended.or_else(|| tasks.try_join_next()) {
            let (node, result) = one.map_err(|panicked| api::Error::Unexpected {
                what: "take a node through".to_owned(),
                why: panicked.to_string(),
            })?;
            planner.ended(&node);
            if let Err(Error::Api(api::Error::NotLeader { what })) = result {
                return Err(api::Error::NotLeader { what });
            }
            ended = None;
        }
    }
}

async fn take_through(steps: Arc<Steps>, Action { node, step }: Action) -> (String, Result<(), Error>) {
    debug!(node, ?step, "start");
    let began = Instant::now();
    let result = steps.run(&node, &step).await;
    let reason = result.as_ref().err().map(Error::reason);
    steps.board.metrics.step_ended(step.name(), began.elapsed(), reason);
    if let Err(error) = &result {
        failed(&steps, &node, error).await;
    }
    (node, result)
}

fn over(what: &str) -> api::Error {
    api::Error::Unexpected { what: what.to_owned(), why: "the watch has ended".to_owned() }
}

/// Who installs flannel again in mid-run takes it off the label: its pods would come to migrated nodes.
async fn tie(steps: &Steps) {
    let set = &steps.settings.flannel.daemon_set;
    if let Err(error) = selectors::tie_flannel(&steps.writer, set).await {
        warn!(step = "selector", error = api::chain(&error), "flannel's DaemonSet can't be looked at");
    }
}

/// Whoever installs flannel again may leave pods behind that nobody ends; a node that flannel is to leave waits for its own.
async fn end_orphans(steps: &Steps, planner: &Planner, now: Moment) {
    let waits = |waiting: &Waiting| {
        let since = planner.leased_for(&waiting.node.name, now.own);
        waiting.reason == FLANNEL_LEAVING && since.is_some_and(|since| since > SAFETY_TICK)
    };
    let nodes: Vec<String> =
        planner.waiting().filter(waits).map(|waiting| waiting.node.name.clone()).take(LOOKED_AT).collect();
    if let Err(error) = orphans::end(&steps.writer, &steps.settings.flannel.daemon_set, &nodes).await {
        warn!(step = "orphan", error = api::chain(&error), "flannel's pods can't be looked at");
    }
}

fn until(now: Timestamp, at: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or_default().max(Duration::from_millis(100))
}

/// Tells what went wrong, and leaves some time for it to change; other nodes go on meanwhile.
async fn failed(steps: &Steps, node: &str, error: &Error) {
    let why = api::chain(error);
    warn!(node, reason = error.reason(), error = why, "step not completed; looking again");
    if !matches!(error, Error::Api(api::Error::NotLeader { .. })) {
        steps.writer.event(node, EventType::Warning, error.reason(), why).await;
        sleep(RETRY_PAUSE).await;
    }
}

/// What was told already: each alarm and each standstill once.
#[derive(Default)]
struct Told {
    alarms: BTreeSet<Alarm>,
    waiting: BTreeMap<String, &'static str>,
    done: Option<usize>,
    request: Option<Request>,
}

impl Told {
    async fn tell(&mut self, steps: &Steps, planner: &Planner) {
        if self.done != Some(planner.done()) {
            self.done = Some(planner.done());
            info!(step = "roll", done = planner.done(), total = planner.total(), "progress");
        }
        if self.request != planner.request() {
            self.request = planner.request();
            let request = planner.request().map_or("none", Request::as_str);
            info!(step = "roll", request, "the administrator's request for the cluster");
        }
        let alarms = planner.alarms();
        for alarm in &alarms {
            if self.alarms.insert(alarm.clone()) {
                error!(
                    node = alarm.node,
                    reason = alarm.reason,
                    why = alarm.message,
                    "a person is needed; no further node is started"
                );
                steps
                    .writer
                    .event(&alarm.node, EventType::Warning, alarm.reason, alarm.message.clone())
                    .await;
            }
        }
        self.alarms.retain(|alarm| alarms.contains(alarm));
        if !enabled!(Level::DEBUG) {
            return;
        }
        for Waiting { node, reason, .. } in planner.waiting() {
            if self.waiting.insert(node.name.clone(), reason) != Some(reason) {
                debug!(node = node.name, reason, "waiting");
            }
        }
    }
}
