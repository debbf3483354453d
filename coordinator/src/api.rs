//! Calls to the API server: bounded in time, named in errors, and, when they write, only while the leadership is held.

use std::fmt::Debug;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use flannel_migration_telemetry::CountCalls;
pub use flannel_migration_telemetry::log::chain;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use kube::client::ClientBuilder;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Config, Resource as _};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tower::limit::ConcurrencyLimitLayer;
use tracing::debug;

use crate::leader::Leadership;
use crate::names;

/// Bound of one call. A healthy API server answers in milliseconds; a lost connection never does.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// How many calls of one client are under way at once. With 500 nodes of 5,000 in change and no bound, a node cost 27.9 requests and 6.4 ms of
/// processor time; with it 18.5 and 3.8 (`hack/bench scale`).
const AT_ONCE: usize = 32;
/// How often a write that lost a race is tried again on the new version.
pub const CONFLICT_RETRIES: u32 = 20;

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused, or couldn't be reached.
    #[error("{what}")]
    Call {
        /// What was to be done; for people.
        what: String,
        /// Why not.
        #[source]
        source: Box<kube::Error>,
    },
    /// No answer.
    #[error("{what}: no answer in time")]
    Timeout {
        /// What was to be done; for people.
        what: String,
    },
    /// Another coordinator leads, or may: nothing was written.
    #[error("{what}: not written, for the leadership is lost")]
    NotLeader {
        /// What was to be done; for people.
        what: String,
    },
    /// What was read makes no sense.
    #[error("{what}: {why}")]
    Unexpected {
        /// What was to be done; for people.
        what: String,
        /// What is wrong.
        why: String,
    },
}

impl Error {
    fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Call { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => Some(status),
                _ => None,
            },
            _ => None,
        }
    }

    /// The object changed since it was read: look again.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.status().is_some_and(kube::core::Status::is_conflict)
    }

    /// The object isn't there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        // Where even the resource isn't known, the answer is plain text.
        self.status().is_some_and(|status| status.is_not_found() || status.code == 404)
    }

    /// The right to do it isn't granted.
    #[must_use]
    pub fn is_forbidden(&self) -> bool {
        self.status().is_some_and(|status| status.code == 403)
    }

    /// The object is there already.
    #[must_use]
    pub fn is_already_exists(&self) -> bool {
        self.status().is_some_and(kube::core::Status::is_already_exists)
    }

    /// Answer 429: for an eviction, a disruption budget is in the way.
    #[must_use]
    pub fn too_many_requests(&self) -> Option<String> {
        let status = self.status().filter(|status| status.code == 429)?;
        let causes =
            status.details.iter().flat_map(|details| &details.causes).map(|cause| cause.message.as_str());
        Some([status.message.as_str()].into_iter().chain(causes).collect::<Vec<_>>().join(" "))
    }

    /// `CamelCase`, for conditions and events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Call { .. } => "ApiCallFailed",
            Self::Timeout { .. } => "ApiCallTimedOut",
            Self::NotLeader { .. } => "LeadershipLost",
            Self::Unexpected { .. } => "UnexpectedObject",
        }
    }
}

/// Result of calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A client from the kubeconfig or the pod's service account. Its own retries are off: each caller knows what an error means.
pub async fn client() -> Result<Client> {
    counted_client(&CountCalls::default()).await
}

/// The same, with its calls counted. No more than 32 are under way at a time, the others wait for their turn, and their bound in
/// time runs: watches, once they have begun, don't count.
pub async fn counted_client(calls: &CountCalls) -> Result<Client> {
    let what = "find the API server (kubeconfig or service account)";
    let unexpected = |why: String| Error::Unexpected { what: what.to_owned(), why };
    let mut config = Config::infer().await.map_err(|error| unexpected(chain(&error)))?;
    config.default_retry = false;
    config.connect_timeout = Some(Duration::from_secs(10));
    let builder = ClientBuilder::try_from(config).map_err(|error| unexpected(chain(&error)))?;
    Ok(builder.with_layer(calls).with_layer(&ConcurrencyLimitLayer::new(AT_ONCE)).build())
}

/// Reads. `what` says it in words, for errors.
pub async fn read<T>(what: impl Into<String>, call: impl Future<Output = kube::Result<T>>) -> Result<T> {
    within(CALL_TIMEOUT, what, call).await
}

async fn within<T>(
    limit: Duration,
    what: impl Into<String>,
    call: impl Future<Output = kube::Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(Error::Call { what: what.into(), source: Box::new(source) }),
        Err(_) => Err(Error::Timeout { what: what.into() }),
    }
}

/// Absence as a value.
pub fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What writing needs: the client and the leadership.
#[derive(Clone)]
pub struct Writer {
    /// The client; reads don't need the leadership.
    pub client: Client,
    leadership: Leadership,
    reporter: Reporter,
    /// Of warnings: it remembers each for minutes, to count one that is told again instead of telling it anew.
    warner: Recorder,
    job: Arc<OnceLock<ObjectReference>>,
}

impl Writer {
    /// Writes only while `leadership` is held.
    #[must_use]
    pub fn new(client: Client, leadership: Leadership, instance: Option<String>) -> Self {
        let reporter = Reporter { controller: names::FIELD_MANAGER.to_owned(), instance };
        let warner = Recorder::new(client.clone(), reporter.clone());
        Self { client, leadership, reporter, warner, job: Arc::default() }
    }

    /// Whether a write may start now.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.leadership.bound().is_some()
    }

    /// The number of leadership changes, which fences grants.
    #[must_use]
    pub fn fence(&self) -> u64 {
        self.leadership.fence()
    }

    /// Writes, unless the leadership isn't certain, and for no longer than it is.
    pub async fn write<T>(
        &self,
        what: impl Into<String>,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T> {
        let what = what.into();
        let Some(bound) = self.leadership.bound() else { return Err(Error::NotLeader { what }) };
        let result = within(bound.min(CALL_TIMEOUT), what.as_str(), call).await;
        match &result {
            Ok(_) => debug!(op = what, "written"),
            Err(error) => debug!(op = what, error = chain(error), "not written"),
        }
        result
    }

    /// A merge patch; with `metadata.resourceVersion` in `patch` it is a compare-and-swap.
    pub async fn merge<K>(
        &self,
        what: impl Into<String>,
        api: &Api<K>,
        name: &str,
        patch: &Value,
    ) -> Result<K>
    where
        K: Clone + DeserializeOwned + Debug,
    {
        let params =
            PatchParams { field_manager: Some(names::FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        self.write(what, api.patch(name, &params, &Patch::Merge(patch))).await
    }

    /// Tells what happened to a node, where `kubectl describe node` shows it. Failing to tell is not a failure of the migration.
    pub async fn event(&self, node: &str, type_: EventType, reason: &str, message: String) {
        // The node's name as UID is what the kubelet and `kubectl describe node` use.
        let reference = ObjectReference {
            api_version: Some(Node::api_version(&()).into_owned()),
            kind: Some(Node::kind(&()).into_owned()),
            name: Some(node.to_owned()),
            uid: Some(node.to_owned()),
            ..ObjectReference::default()
        };
        self.record(&reference, type_, reason, &message).await;
    }

    /// Tells what the migration is at, where `kubectl describe job` shows it. Started by hand, there is no Job to tell it of.
    pub async fn job_event(&self, namespace: &str, type_: EventType, reason: &str, message: &str) {
        if self.job.get().is_none() {
            let jobs: Api<Job> = Api::namespaced(self.client.clone(), namespace);
            let ours = ListParams::default().fields(&format!("metadata.name={}", names::JOB));
            match read("read the Job", jobs.list(&ours)).await {
                Ok(found) => {
                    if let Some(job) = found.items.first() {
                        let _ = self.job.set(job.object_ref(&()));
                    }
                }
                Err(error) => debug!(error = chain(&error), "the Job isn't known"),
            }
        }
        if let Some(job) = self.job.get() {
            self.record(job, type_, reason, message).await;
        }
    }

    async fn record(&self, about: &ObjectReference, type_: EventType, reason: &str, message: &str) {
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(message.chars().take(900).collect()),
            action: "Migrate".to_owned(),
            secondary: None,
        };
        // What goes well is told once: of thousands of nodes there is nothing to be remembered.
        let recorder = match event.type_ {
            EventType::Normal => &Recorder::new(self.client.clone(), self.reporter.clone()),
            EventType::Warning => &self.warner,
        };
        let told = tokio::time::timeout(CALL_TIMEOUT, recorder.publish(&event, about)).await;
        if !matches!(told, Ok(Ok(()))) {
            debug!(about = about.name, reason, ?told, "event not recorded");
        }
    }
}

/// Parameters of creating and replacing.
#[must_use]
pub fn post() -> PostParams {
    PostParams { field_manager: Some(names::FIELD_MANAGER.to_owned()), ..PostParams::default() }
}
