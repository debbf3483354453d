//! Whether the API server grants what the manifests say is needed: asked before anything is written.

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec, SubjectAccessReview,
    SubjectAccessReviewSpec,
};
use k8s_openapi::api::rbac::v1::PolicyRule;
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::Value;

use crate::api::{Result, read};

/// The rights of the coordinator, as the manifests grant them: what is asked for is what is granted.
const COORDINATOR: &str = include_str!("../../manifests/coordinator-rights.yaml");
/// Those of the preflight Job.
const PREFLIGHT: &str = include_str!("../../manifests/preflight/preflight.yaml");
/// Reviews at once.
const AT_ONCE: usize = 8;

/// One thing that somebody may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// get, list, ...
    pub verb: String,
    /// API group; empty: the core.
    pub group: String,
    /// Resource.
    pub resource: String,
    /// Subresource; empty: the resource itself.
    pub subresource: String,
    /// One object; empty: all.
    pub name: String,
    /// Where; empty: everywhere.
    pub namespace: String,
}

impl Right {
    /// What it is about, for people.
    #[must_use]
    pub fn on(&self) -> String {
        let mut text = self.resource.clone();
        for (mark, part) in [(".", &self.group), ("/", &self.subresource), (" ", &self.name)] {
            if !part.is_empty() {
                text.push_str(mark);
                text.push_str(part);
            }
        }
        if !self.namespace.is_empty() {
            text.push_str(" in namespace ");
            text.push_str(&self.namespace);
        }
        text
    }

    fn attributes(&self) -> ResourceAttributes {
        let some = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        ResourceAttributes {
            verb: some(&self.verb),
            group: Some(self.group.clone()),
            resource: some(&self.resource),
            subresource: some(&self.subresource),
            name: some(&self.name),
            namespace: some(&self.namespace),
            ..ResourceAttributes::default()
        }
    }
}

/// What the coordinator needs.
#[must_use]
pub fn of_coordinator() -> Vec<Right> {
    of(COORDINATOR)
}

/// What preflight needs.
#[must_use]
pub fn of_preflight() -> Vec<Right> {
    of(PREFLIGHT)
}

/// The rights that the roles of a manifest grant.
fn of(manifest: &str) -> Vec<Right> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifest).unwrap_or_default();
    let mut rights = Vec::new();
    for document in documents {
        let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default();
        if !matches!(kind, "Role" | "ClusterRole") {
            continue;
        }
        let namespace = document.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default();
        let rules = document.get("rules").cloned().unwrap_or_default();
        let rules: Vec<PolicyRule> = serde_json::from_value(rules).unwrap_or_default();
        rights.extend(rules.iter().flat_map(|rule| expand(rule, namespace)));
    }
    rights.sort();
    rights.dedup();
    rights
}

fn expand(rule: &PolicyRule, namespace: &str) -> Vec<Right> {
    let any = vec![String::new()];
    let names = rule.resource_names.as_ref().filter(|names| !names.is_empty()).unwrap_or(&any);
    let mut rights = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
            for name in names {
                rights.extend(rule.verbs.iter().map(|verb| Right {
                    verb: verb.clone(),
                    group: group.clone(),
                    resource: resource.to_owned(),
                    subresource: subresource.to_owned(),
                    name: name.clone(),
                    namespace: namespace.to_owned(),
                }));
            }
        }
    }
    rights
}

/// Which of `rights` this process doesn't have.
pub async fn own_lacking(client: &Client, rights: &[Right]) -> Result<Vec<Right>> {
    lacking(rights, |right| async {
        let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(right.attributes()),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let done =
            read("ask for this process's rights", reviews.create(&PostParams::default(), &review)).await?;
        Ok(done.status.is_some_and(|status| status.allowed))
    })
    .await
}

/// Which of `rights` the service account `name` of `namespace` doesn't have.
pub async fn accounts_lacking(
    client: &Client,
    namespace: &str,
    name: &str,
    rights: &[Right],
) -> Result<Vec<Right>> {
    let user = format!("system:serviceaccount:{namespace}:{name}");
    let groups =
        ["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}"), "system:authenticated"]
            .map(str::to_owned)
            .to_vec();
    lacking(rights, |right| {
        let (user, groups) = (user.clone(), groups.clone());
        async move {
            let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
            let review = SubjectAccessReview {
                spec: SubjectAccessReviewSpec {
                    resource_attributes: Some(right.attributes()),
                    user: Some(user),
                    groups: Some(groups),
                    ..SubjectAccessReviewSpec::default()
                },
                ..SubjectAccessReview::default()
            };
            let done =
                read("ask for the coordinator's rights", reviews.create(&PostParams::default(), &review))
                    .await?;
            Ok(done.status.is_some_and(|status| status.allowed))
        }
    })
    .await
}

async fn lacking<'a, F, A>(rights: &'a [Right], allowed: F) -> Result<Vec<Right>>
where
    F: Fn(&'a Right) -> A,
    A: Future<Output = Result<bool>>,
{
    let reviews = rights.iter().map(|right| {
        let allowed = allowed(right);
        async move { Ok::<_, crate::api::Error>((right, allowed.await?)) }
    });
    let reviewed: Vec<_> = stream::iter(reviews).buffer_unordered(AT_ONCE).try_collect().await?;
    let mut lacking: Vec<Right> =
        reviewed.into_iter().filter(|(_, allowed)| !allowed).map(|(right, _)| right.clone()).collect();
    lacking.sort();
    Ok(lacking)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rights_that_are_asked_for_are_those_that_the_manifests_grant() {
        let all = of_coordinator();
        let texts: Vec<String> = all.iter().map(|right| format!("{} {}", right.verb, right.on())).collect();
        for text in [
            "create pods/eviction",
            "patch nodes",
            "list ippools.crd.projectcalico.org",
            "get leases.coordination.k8s.io flannel-migration in namespace kube-system",
        ] {
            assert!(texts.iter().any(|known| known == text), "{text}: {texts:?}");
        }
        assert!(all.len() > 40);
    }

    #[test]
    fn preflight_changes_nothing() {
        let all = of_preflight();
        assert!(all.len() > 5);
        for right in all {
            let reads = ["get", "list", "watch"].contains(&right.verb.as_str());
            // A review is an answer; nothing is stored.
            assert!(reads || right.resource == "subjectaccessreviews", "{} {}", right.verb, right.on());
        }
    }
}
