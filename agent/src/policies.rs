//! Which pods a policy restricts in what they send, as Felix has written it into the packet filter: into iptables, or into a table of its
//! own in nftables.
//!
//! What an interface's pod sends goes through a chain of the interface's own. That chain leads to the chain of each policy, or, where
//! several policies have one selector, to a chain of their group.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::host::{iptables, nft, tables};
use crate::steps::Error;

/// Start of the name of an interface's chain.
const INTERFACE: &str = "cali-fw-";
/// Starts of the names of policies' and groups' chains. Profiles, which every pod has, are `cali-pro-`.
const POLICIES: [&str; 2] = ["cali-po-", "cali-go-"];
/// In its one table of nftables Felix puts the name that the table would have in iptables before a chain's.
const LAYER: &str = "filter-";

/// The interfaces on which Felix enforces an egress policy. Kubernetes' policies are of both families alike: IPv4 tells of both.
pub fn restricted() -> Result<BTreeSet<String>, Error> {
    let mut found = BTreeSet::new();
    for world in ["iptables-nft", "iptables-legacy"] {
        found.extend(in_iptables(&iptables::save(world)?.unwrap_or_default()));
    }
    if tables::is_there(nft::FELIX_IPV4)? {
        // A table of a newer `nft` that this one can't list excuses nobody; without policies that makes no difference.
        match nft::rules(nft::FELIX_IPV4).map(|listing| in_nftables(&listing)) {
            Ok(Ok(interfaces)) => found.extend(interfaces),
            Ok(Err(error)) => unread(&error),
            Err(error) => unread(&error),
        }
    }
    Ok(found)
}

fn unread(error: &(dyn std::error::Error + 'static)) {
    let error = crate::steps::chain(error);
    tracing::warn!(step = "verify", error, "which pods a policy restricts can't be read from nftables");
}

/// In what `iptables-save` printed.
fn in_iptables(save: &str) -> BTreeSet<String> {
    let rules = save.lines().filter_map(|line| line.strip_prefix("-A ")?.split_once(' '));
    rules
        .filter(|(_, rule)| {
            let mut words = rule.split(' ').skip_while(|word| !matches!(*word, "-j" | "-g"));
            words.nth(1).is_some_and(leads_to_policy)
        })
        .filter_map(|(chain, _)| interface(chain))
        .collect()
}

/// In what `nft --json list table` printed.
fn in_nftables(listing: &str) -> Result<BTreeSet<String>, serde_json::Error> {
    let listing: Listing = serde_json::from_str(listing)?;
    let rules = listing.nftables.into_iter().filter_map(|object| object.rule);
    let restricting = rules.filter(|rule| {
        rule.expr.iter().any(|statement| match statement {
            Statement::Jump { jump: to } | Statement::Goto { goto: to } => {
                to.target.strip_prefix(LAYER).is_some_and(leads_to_policy)
            }
            Statement::Other(_) => false,
        })
    });
    Ok(restricting.filter_map(|rule| interface(rule.chain.strip_prefix(LAYER)?)).collect())
}

fn interface(chain: &str) -> Option<String> {
    chain.strip_prefix(INTERFACE).map(str::to_owned)
}

fn leads_to_policy(target: &str) -> bool {
    POLICIES.iter().any(|start| target.starts_with(start))
}

/// As much as is asked of `nft`'s JSON (`libnftables-json(5)`).
#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    rule: Option<Rule>,
}

#[derive(Deserialize)]
struct Rule {
    chain: String,
    #[serde(default)]
    expr: Vec<Statement>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Statement {
    Jump { jump: Target },
    Goto { goto: Target },
    Other(IgnoredAny),
}

#[derive(Deserialize)]
struct Target {
    target: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVE: &str = r#"*filter
:cali-fw-cali00000000000 - [0:0]
-A cali-from-wl-dispatch -i cali22222222222 -m comment --comment "cali:8gaZ8W5SxOPmrSDN" -g cali-fw-cali22222222222
-A cali-fw-cali00000000000 -m comment --comment "cali:bYmi9DkRzdMSYwOV" -j cali-pro-kns.app
-A cali-tw-cali11111111111 -m comment --comment "cali:Vgw7kqF1cVbUJgaR" -m mark --mark 0x0/0x20000 -j cali-pi-_kNSGHKDtmSUVB9mPAAU
-A cali-fw-cali22222222222 -m comment --comment "cali:nGYUpWdnhGTZfBsv" -m mark --mark 0x0/0x20000 -j cali-po-_hFCmbKWy3dQUlXPbGcG
-A cali-fw-cali22222222222 -m comment --comment "cali:5aVwYxEtmQ0pHuPx" -m comment --comment "End of tier default. Drop if no policies passed packet" -m mark --mark 0x0/0x20000 -j DROP
-A cali-fw-cali33333333333 -m comment --comment "cali:lC2ZgqxOmJ1cZEbT" -m mark --mark 0x0/0x20000 -j cali-go-_JSbtYDbt_XGYEqTuCsP
-A cali-go-_JSbtYDbt_XGYEqTuCsP -m comment --comment "cali:4BbGz0_kqPjYgNcO" -j cali-po-_hFCmbKWy3dQUlXPbGcG
COMMIT
"#;

    /// What nft 1.0.6 printed of the table of Felix v3.32.1, but for sets, maps and chains that no pod's own chain leads to.
    const LISTING: &str = include_str!("policies/felix.json");

    #[test]
    fn one_policy_and_a_group_of_them_restrict_and_profiles_and_ingress_policies_do_not() {
        let restricted: BTreeSet<String> = ["cali22222222222", "cali33333333333"].map(str::to_owned).into();
        assert_eq!(in_iptables(SAVE), restricted);
        assert_eq!(in_nftables(LISTING).unwrap(), restricted);
    }

    #[test]
    fn what_a_newer_nft_may_add_is_passed_over() {
        let listing = r#"{"nftables": [
            {"metainfo": {"version": "9.9", "json_schema_version": 2}}, {"marvel": [1]},
            {"rule": {"family": "ip", "table": "calico", "chain": "filter-cali-fw-cali1", "expr": [
                "new", {"new": "statement"}, {"drop": null}, {"jump": {"target": "filter-cali-po-knp/app/deny", "new": 1}}]}},
            {"rule": {"family": "ip", "table": "calico", "chain": "filter-cali-fw-cali2"}}]}"#;
        assert_eq!(in_nftables(listing).unwrap(), ["cali1".to_owned()].into());
        assert!(in_nftables("").is_err());
    }
}
