//! Leadership: a coordination Lease, so that two coordinators (an old pod that lingers on a dead node, and its replacement) never act at
//! once. The number of hand-overs fences what an old leader may still have under way.

use std::sync::Arc;
use std::time::Duration;

use flannel_migration_telemetry::Probes;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta};
use kube::{Client, ResourceExt as _};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use crate::api::{self, Error, Result};
use crate::names;

/// How long a lease holds without renewal.
const DURATION: Duration = Duration::from_secs(15);
/// How often it is renewed.
const RENEW: Duration = Duration::from_secs(4);
/// How often a candidate looks. A released lease is taken within this time.
const LOOK: Duration = Duration::from_millis(500);
/// No write starts later than this before the lease's end, and none is waited for beyond it: a successor reads the cluster after that
/// end, and must not read what a write of ours still changes.
const MARGIN: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug)]
struct Tenure {
    until: Instant,
    fence: u64,
}

/// Whether this process leads.
#[derive(Clone, Debug)]
pub struct Leadership {
    tenure: Arc<watch::Sender<Option<Tenure>>>,
}

impl Leadership {
    /// One that nobody takes away.
    #[cfg(test)]
    pub(crate) fn held_for_ever() -> Self {
        let until = Instant::now() + Duration::from_hours(24 * 365);
        Self { tenure: Arc::new(watch::Sender::new(Some(Tenure { until, fence: 1 }))) }
    }

    /// For how long a write that starts now may be under way; `None`: none may start.
    #[must_use]
    pub fn bound(&self) -> Option<Duration> {
        let left = (*self.tenure.borrow())?.until.saturating_duration_since(Instant::now());
        (left > MARGIN).then_some(left)
    }

    /// The number of hand-overs; 0 when this process never led.
    #[must_use]
    pub fn fence(&self) -> u64 {
        self.tenure.borrow().map_or(0, |tenure| tenure.fence)
    }

    /// Waits until the leadership is lost.
    pub async fn lost(&self) {
        let mut tenure = self.tenure.subscribe();
        loop {
            let Some(now) = *tenure.borrow_and_update() else { return };
            tokio::select! {
                () = tokio::time::sleep_until(now.until) => if tenure.borrow().is_none_or(|later| later.until <= Instant::now()) { return },
                changed = tenure.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// A candidate for, then the holder of the leadership.
pub struct Candidate {
    leases: Api<Lease>,
    identity: String,
    leadership: Leadership,
    probes: Probes,
}

impl Candidate {
    /// `identity` must be unique among running coordinators: the pod's name.
    #[must_use]
    pub fn new(client: Client, namespace: &str, identity: String, probes: Probes) -> Self {
        let leadership = Leadership { tenure: Arc::new(watch::Sender::new(None)) };
        Self { leases: Api::namespaced(client, namespace), identity, leadership, probes }
    }

    /// What others ask whether a write may start.
    #[must_use]
    pub fn leadership(&self) -> Leadership {
        self.leadership.clone()
    }

    /// Waits until this process leads. Another's lease is taken only when it was seen unchanged for its whole duration by this
    /// process's own clock: clocks of different machines are never compared.
    pub async fn acquire(&self) -> Result<()> {
        let mut seen: Option<(String, Instant)> = None;
        loop {
            self.probes.beat();
            match self.look(&mut seen).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if error.is_conflict() || error.is_already_exists() => {
                    debug!("another candidate was faster");
                }
                Err(error) => warn!(error = api::chain(&error), "can't take the leadership yet"),
            }
            sleep(LOOK).await;
        }
    }

    async fn look(&self, seen: &mut Option<(String, Instant)>) -> Result<bool> {
        let started = Instant::now();
        let Some(lease) = self.get().await? else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(names::LEASE.to_owned()), ..ObjectMeta::default() },
                spec: Some(self.spec(1)),
            };
            api::read("create the leadership's Lease", self.leases.create(&api::post(), &lease)).await?;
            return Ok(self.held(started, 1));
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let version = lease.resource_version().unwrap_or_default();
        let unchanged_since = match seen {
            Some((seen_version, since)) if *seen_version == version => *since,
            _ => {
                if !holder.is_empty() && holder != self.identity {
                    info!(holder, "another coordinator leads; waiting for its lease to end");
                }
                *seen = Some((version, started));
                started
            }
        };
        let duration = spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(DURATION, Duration::from_secs);
        if !holder.is_empty() && holder != self.identity && unchanged_since.elapsed() < duration {
            return Ok(false);
        }
        let transitions = spec.lease_transitions.unwrap_or(0).saturating_add(1);
        self.replace(lease, transitions).await?;
        Ok(self.held(started, transitions))
    }

    /// Renews for as long as it can; returns when the leadership is lost.
    pub async fn keep(&self) {
        loop {
            self.probes.beat();
            sleep(RENEW).await;
            let started = Instant::now();
            match self.renew().await {
                Ok(transitions) => {
                    self.held(started, transitions);
                }
                Err(error) => {
                    let over =
                        self.leadership.tenure.borrow().is_none_or(|tenure| tenure.until <= Instant::now());
                    warn!(error = api::chain(&error), over, "leadership not renewed");
                    if over || matches!(error, Error::NotLeader { .. }) {
                        self.leadership.tenure.send_replace(None);
                        return;
                    }
                }
            }
        }
    }

    async fn renew(&self) -> Result<i32> {
        let lost = || Error::NotLeader { what: "renew the leadership".to_owned() };
        let lease = self.get().await?.ok_or_else(lost)?;
        let spec = lease.spec.clone().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            return Err(lost());
        }
        let transitions = spec.lease_transitions.unwrap_or(1);
        self.replace(lease, transitions).await?;
        Ok(transitions)
    }

    /// Gives the leadership up, so that a successor needs not wait.
    pub async fn release(&self) {
        if self.leadership.tenure.send_replace(None).is_none() {
            return;
        }
        let released = async {
            let Some(mut lease) = self.get().await? else { return Ok(()) };
            if let Some(spec) =
                lease.spec.as_mut().filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity))
            {
                spec.holder_identity = None;
                api::read("release the leadership", self.leases.replace(names::LEASE, &api::post(), &lease))
                    .await?;
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = released.await {
            warn!(error = api::chain(&error), "leadership not released; a successor waits for its end");
        }
    }

    /// Removes the Lease: the last act of a migration.
    pub async fn remove(&self) -> Result<()> {
        self.leadership.tenure.send_replace(None);
        api::found(
            api::read(
                "remove the leadership's Lease",
                self.leases.delete(names::LEASE, &kube::api::DeleteParams::default()),
            )
            .await,
        )?;
        Ok(())
    }

    async fn get(&self) -> Result<Option<Lease>> {
        api::found(api::read("read the leadership's Lease", self.leases.get(names::LEASE)).await)
    }

    async fn replace(&self, mut lease: Lease, transitions: i32) -> Result<()> {
        lease.spec = Some(self.spec(transitions));
        api::read("write the leadership's Lease", self.leases.replace(names::LEASE, &api::post(), &lease))
            .await?;
        Ok(())
    }

    fn spec(&self, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            renew_time: Some(MicroTime(Timestamp::now())),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }

    // The tenure counts from before the call: the API server can't have stored it earlier.
    fn held(&self, started: Instant, transitions: i32) -> bool {
        let fence = u64::try_from(transitions).unwrap_or(0);
        self.leadership.tenure.send_replace(Some(Tenure { until: started + DURATION, fence }));
        true
    }
}
