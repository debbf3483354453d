//! Names of objects of ours in the cluster.

/// Who writes, as the API server records it in managed fields and events.
pub const FIELD_MANAGER: &str = "flannel-migration-coordinator";
/// The Job.
pub const JOB: &str = "flannel-migration";
/// The DaemonSet of the agents.
pub const AGENT: &str = "flannel-migration-agent";
/// The leadership's Lease.
pub const LEASE: &str = "flannel-migration";
/// The ConfigMap with the status, for dashboards; made by the manifests.
pub const STATUS: &str = "flannel-migration-status";
/// The short-lived DaemonSet that pulls Calico's images.
pub const PULLER: &str = "flannel-migration-images";
/// Label of pods, and its value on the coordinator's own.
pub const APP_LABEL: &str = "k8s-app";
/// Value of [`APP_LABEL`] on the coordinator's pod; users select by it.
pub const APP: &str = "flannel-migration-controller";
/// Annotation on a DaemonSet whose update strategy is set aside: the original, as JSON.
pub const ORIGINAL_STRATEGY: &str = "flannel-migration/original-update-strategy";
