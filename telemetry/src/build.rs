//! Which version runs.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

/// Registers `build_info`, which is 1 with the version as its label.
pub fn register(registry: &mut Registry, version: &'static str) {
    let build = Family::<Build, Gauge>::default();
    build.get_or_create(&Build { version }).set(1);
    registry.register("build_info", "1 for the version that runs", build);
}
