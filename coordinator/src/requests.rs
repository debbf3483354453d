//! What an administrator asks of the whole cluster: an annotation of the Job, watched; and the Job's suspension, which is the answer.

use flannel_migration_protocol::{Request, keys};
use k8s_openapi::api::batch::v1::Job;
use kube::api::Api;
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio::sync::watch;
use tracing::warn;

use crate::api::{Result, Writer, found, read};
use crate::cluster::Watched;
use crate::names;

/// The requests about the whole cluster.
#[derive(Clone)]
pub struct Requests {
    jobs: Api<Job>,
    watched: Watched<Job>,
}

impl Requests {
    /// Watches the Job of `namespace`; without one, nothing is asked.
    pub async fn watch(client: Client, namespace: &str) -> Result<Self> {
        let jobs: Api<Job> = Api::namespaced(client, namespace);
        let config = watcher::Config::default().fields(&format!("metadata.name={}", names::JOB));
        let watched = Watched::new("the Job", jobs.clone(), config).await?;
        Ok(Self { jobs, watched })
    }

    /// What is asked, as far as it is known.
    #[must_use]
    pub fn now(&self) -> Option<Request> {
        self.watched.all().first().and_then(|job| of(job))
    }

    /// What is asked, read from the API server: before what can't be taken back.
    pub async fn certain(&self) -> Result<Option<Request>> {
        let job = found(read("read the Job", self.jobs.get(names::JOB)).await)?;
        Ok(job.as_ref().and_then(of))
    }

    /// What wakes up on each change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.watched.changes()
    }

    /// Suspends the Job: its pods end, and it says so until it is resumed.
    pub async fn suspend(&self, writer: &Writer) -> Result<()> {
        let patch = json!({ "spec": { "suspend": true } });
        found(writer.merge("suspend the Job", &self.jobs, names::JOB, &patch).await)?;
        Ok(())
    }
}

/// What an administrator asks by this Job. What can't be read holds everything back.
fn of(job: &Job) -> Option<Request> {
    let text = job.annotations().get(keys::REQUEST)?;
    match text.parse() {
        Ok(request) => Some(request),
        Err(error) => {
            warn!(error = %error, "the Job's annotation {} can't be read; nothing is started", keys::REQUEST);
            Some(Request::Pause)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_holds_everything_back() {
        let mut job = Job::default();
        assert_eq!(of(&job), None);
        job.annotations_mut().insert(keys::REQUEST.into(), "rollback".into());
        assert_eq!(of(&job), Some(Request::Rollback));
        job.annotations_mut().insert(keys::REQUEST.into(), "go back".into());
        assert_eq!(of(&job), Some(Request::Pause));
    }
}
