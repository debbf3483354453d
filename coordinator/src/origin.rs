//! Which version an image holds, and who would put a changed object back. Pure.

use std::fmt;

use kube::ResourceExt;

/// A release's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// The version in an image's tag, whatever follows it (`-amd64`, `-build20250101`), also that of a branch (`release-v3.33`); none in a tag
/// like `latest`, or without a tag.
#[must_use]
pub fn version_of(image: &str) -> Option<Version> {
    let name = image.split('@').next()?.rsplit('/').next()?;
    let tag = name.split_once(':')?.1;
    let tag = tag.strip_prefix("release-").unwrap_or(tag);
    let mut numbers = tag.trim_start_matches('v').splitn(3, '.');
    let digits = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text.get(..end).and_then(|digits| digits.parse().ok())
    };
    Some(Version(
        numbers.next()?.parse().ok()?,
        digits(numbers.next()?)?,
        numbers.next().and_then(digits).unwrap_or(0),
    ))
}

/// Who would undo changes to the object: a package manager, a repository it is kept equal to, or an operator.
#[must_use]
pub fn keeper(object: &impl ResourceExt) -> Option<String> {
    let (labels, annotations) = (object.labels(), object.annotations());
    if let Some(release) = annotations.get("meta.helm.sh/release-name") {
        return Some(format!("Helm (release {release})"));
    }
    let signs = [
        ("argocd.argoproj.io/tracking-id", "Argo CD"),
        ("argocd.argoproj.io/instance", "Argo CD"),
        ("kustomize.toolkit.fluxcd.io/name", "Flux"),
        ("helm.toolkit.fluxcd.io/name", "Flux"),
        ("addon.kops.k8s.io/name", "kOps"),
        ("objectset.rio.cattle.io/id", "the Helm controller of RKE2 or k3s"),
    ];
    if let Some((_, who)) =
        signs.iter().find(|(key, _)| labels.contains_key(*key) || annotations.contains_key(*key))
    {
        return Some((*who).to_owned());
    }
    if labels.get("app.kubernetes.io/managed-by").is_some_and(|by| by == "Helm") {
        return Some("Helm".to_owned());
    }
    object
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true))
        .map(|owner| format!("{} {}", owner.kind, owner.name))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::DaemonSet;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("ghcr.io/flannel-io/flannel:v0.28.10", Some("0.28.10"))]
    #[case("quay.io/coreos/flannel:v0.9.0-amd64", Some("0.9.0"))]
    #[case("rancher/hardened-flannel:v0.26.4-build20250218", Some("0.26.4"))]
    #[case("localhost:5000/flannel:0.14@sha256:00", Some("0.14.0"))]
    #[case("quay.io/calico/node:release-v3.33", Some("3.33.0"))]
    #[case("flannel@sha256:00", None)]
    #[case("quay.io/calico/calico:master", None)]
    #[case("localhost:5000/flannel", None)]
    #[case("flannel:latest", None)]
    #[case("flannel:v1", None)]
    #[case("", None)]
    fn a_version_is_read_from_the_tag(#[case] image: &str, #[case] version: Option<&str>) {
        assert_eq!(version_of(image).map(|version| version.to_string()).as_deref(), version);
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(version_of("f:v0.9.1") < version_of("f:v0.10.0"));
    }

    #[rstest]
    #[case("{annotations: {meta.helm.sh/release-name: cni}}", Some("Helm (release cni)"))]
    #[case("{labels: {app.kubernetes.io/managed-by: Helm}}", Some("Helm"))]
    #[case("{labels: {kustomize.toolkit.fluxcd.io/name: x}}", Some("Flux"))]
    #[case("{labels: {argocd.argoproj.io/instance: x}}", Some("Argo CD"))]
    #[case(
        "{ownerReferences: [{kind: Network, name: cluster, controller: true, apiVersion: v1, uid: u}]}",
        Some("Network cluster")
    )]
    #[case("{ownerReferences: [{kind: Network, name: cluster, apiVersion: v1, uid: u}]}", None)]
    #[case("{labels: {app: flannel}}", None)]
    fn who_puts_an_object_back_is_known_by_its_marks(#[case] metadata: &str, #[case] who: Option<&str>) {
        let set: DaemonSet = serde_saphyr::from_str(&format!("metadata: {metadata}")).unwrap();
        assert_eq!(keeper(&set).as_deref(), who);
    }
}
