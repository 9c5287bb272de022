//! Every policy by its name, with a weight after `@` where it has one.

use router_core::{PolicyName, nearest};

use super::indicators::Indicator;
use super::{Core, Rival};
use super::{aibrix, bailian, d2lpm, dual_map, dynamo, hits, indicators, linear, llm_d, llumnix, load, lpt, min_ttft};
use super::{mooncake, polyserve, preble, product_time, production_stack, sglang, smetric, sticky};
use crate::device::Device;

/// Why there is no such policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RivalError {
    /// Nobody of this name.
    #[error("no such policy: {name}\n{nearest}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// A name like it, or all.
        nearest: String,
    },
    /// It has no weight, or not this one.
    #[error("not a weight of {name}: {weight}\n{name} takes {takes}")]
    Weight {
        /// The policy.
        name: String,
        /// What stood after the `@`.
        weight: String,
        /// What may stand there.
        takes: &'static str,
    },
}

/// What may stand after the `@`.
#[derive(Clone, Copy)]
struct Weight {
    default: f64,
    takes: &'static str,
    holds: fn(f64) -> bool,
}

/// Rivals without a weight, in the order of their tables.
const PLAIN: [&str; 28] = [
    "power_of_two",
    "jsq",
    "least_wait_token",
    "least_token_load",
    "most_hit",
    "bounded_most_hit",
    "bailian",
    "dynamo_first",
    "sglang",
    "sglang_cli",
    "aibrix",
    "llm_d",
    "llm_d_10_1",
    "min_ttft",
    "preble",
    "mooncake",
    "stack_session",
    "stack_kvaware",
    "stack_prefixaware",
    "llumnix",
    "polyserve",
    "smetric",
    "smetric_held",
    "dual_map",
    "sticky",
    "scls_lpt",
    "product_seconds",
    // the core has it too; here the device's law gives it its seconds
    "product_time",
];

/// Rivals with one.
const WEIGHTED: [(&str, Weight); 5] = [
    ("linear", Weight { default: 0.7, takes: "a weight from 0 to 1", holds: |w| (0.0..=1.0).contains(&w) }),
    ("dynamo", Weight { default: 1.0, takes: "a weight of at least 0", holds: |w| w >= 0.0 }),
    ("dynamo_softmax", Weight { default: 0.5, takes: "a temperature above 0", holds: |w| w > 0.0 }),
    ("dynamo_2026", Weight { default: 0.0, takes: "a decay of at least 0", holds: |w| w >= 0.0 }),
    ("d2lpm", Weight { default: 65_536.0, takes: "a quantum of at least 1 token", holds: |w| w >= 1.0 }),
];

/// All names, without weights: the core's first.
pub fn names() -> Vec<&'static str> {
    let core = PolicyName::ALL.iter().map(|name| name.as_str()).filter(|name| !PLAIN.contains(name));
    let weighted = WEIGHTED.iter().map(|(name, _)| *name);
    core.chain(PLAIN).chain(weighted).chain(Indicator::ALL.iter().map(|(name, _)| *name)).collect()
}

/// The policy of this name for so many workers of this kind. What is drawn is drawn by the seed.
pub fn make(name: &str, device: &Device, workers: u32, seed: u64) -> Result<Box<dyn Rival>, RivalError> {
    let (bare, weight) = name.split_once('@').map_or((name, None), |(bare, weight)| (bare, Some(weight)));
    if let Some((_, kind)) = WEIGHTED.iter().find(|(known, _)| *known == bare) {
        return weighted(bare, weight, kind, seed);
    }
    let rival = plain(bare, device, workers, seed).ok_or_else(|| unknown(bare))?;
    match weight {
        None => Ok(rival),
        Some(weight) => Err(RivalError::Weight { name: bare.to_owned(), weight: weight.to_owned(), takes: "none" }),
    }
}

fn weighted(name: &str, weight: Option<&str>, kind: &Weight, seed: u64) -> Result<Box<dyn Rival>, RivalError> {
    let value = weight.map_or(Some(kind.default), |text| text.parse().ok());
    let Some(value) = value.filter(|&value: &f64| value.is_finite() && (kind.holds)(value)) else {
        let weight = weight.unwrap_or_default().to_owned();
        return Err(RivalError::Weight { name: name.to_owned(), weight, takes: kind.takes });
    };
    Ok(match name {
        "linear" => Box::new(linear::Linear { lam: value }),
        "dynamo" => Box::new(dynamo::Dynamo { weight: value }),
        "dynamo_softmax" => Box::new(dynamo::DynamoSoftmax::new(value, seed)),
        "dynamo_2026" => Box::new(dynamo::Dynamo2026 { decay: value }),
        "d2lpm" => Box::new(d2lpm::D2lpm::new(value)),
        _ => return Err(unknown(name)),
    })
}

fn plain(name: &str, device: &Device, workers: u32, seed: u64) -> Option<Box<dyn Rival>> {
    Some(match name {
        "power_of_two" => Box::new(load::PowerOfTwo::new(seed)),
        "jsq" => Box::new(load::Jsq),
        "least_wait_token" => Box::new(load::LeastWaitToken),
        "least_token_load" => Box::new(load::LeastTokenLoad),
        "most_hit" => Box::new(hits::MostHit),
        "bounded_most_hit" => Box::new(hits::BoundedMostHit),
        "bailian" => Box::new(bailian::Bailian),
        "dynamo_first" => Box::new(dynamo::DynamoFirst),
        "sglang" => Box::new(sglang::Sglang::standard()),
        "sglang_cli" => Box::new(sglang::Sglang::cli()),
        "aibrix" => Box::new(aibrix::Aibrix),
        "llm_d" => Box::new(llm_d::LlmD),
        "llm_d_10_1" => Box::new(llm_d::LlmD10),
        "min_ttft" => Box::new(min_ttft::MinTtft::new(device)),
        "preble" => Box::new(preble::Preble::new(device)),
        "mooncake" => Box::new(mooncake::Mooncake::new(device)),
        "stack_session" => Box::new(production_stack::StackSession::default()),
        "stack_kvaware" => Box::new(production_stack::StackKvaware::default()),
        "stack_prefixaware" => Box::new(production_stack::StackPrefixaware::new(seed)),
        "llumnix" => Box::new(llumnix::Llumnix),
        "polyserve" => Box::new(polyserve::Polyserve::new(device, seed)),
        "smetric" => Box::new(smetric::Smetric::new(device)),
        "smetric_held" => Box::new(smetric::Smetric::guessing(device)),
        "dual_map" => Box::new(dual_map::DualMap::new(device, workers)),
        "sticky" => Box::new(sticky::Sticky::default()),
        "scls_lpt" => Box::new(lpt::SclsLpt::new(device)),
        "product_seconds" => Box::new(indicators::ProductSeconds::new(device)),
        "product_time" => Box::new(product_time::ProductTime::new(device)),
        _ => return variant(name).or_else(|| core(name, seed)),
    })
}

fn variant(name: &str) -> Option<Box<dyn Rival>> {
    let (_, indicator) = Indicator::ALL.iter().find(|(known, _)| *known == name)?;
    Some(Box::new(indicators::Variant(*indicator)))
}

fn core(name: &str, seed: u64) -> Option<Box<dyn Rival>> {
    let policy: PolicyName = name.parse().ok()?;
    Some(Box::new(Core(policy.policy(seed))))
}

fn unknown(name: &str) -> RivalError {
    let names = names();
    let nearest = nearest(name, names.iter().copied())
        .map_or_else(|| format!("policies: {}", names.join(", ")), |near| format!("did you mean {near}?"));
    RivalError::Unknown { name: name.to_owned(), nearest }
}

#[cfg(test)]
mod unit {
    use super::*;
    use crate::rival::tests::device;

    #[test]
    fn every_name_makes_a_policy_that_says_it() {
        let device = device();
        for name in names() {
            let made = make(name, &device, 4, 1).map(|rival| rival.name()).unwrap_or_default();
            assert_eq!(made.split('@').next(), Some(name));
            // and what it says makes it again
            assert!(make(&made, &device, 4, 1).is_ok_and(|rival| rival.name() == made), "{made}");
        }
        let mut sorted = names();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), names().len(), "a name twice");
    }

    #[test]
    fn a_typo_is_told_the_nearest_and_a_stranger_all() {
        let device = device();
        let error = |name: &str| make(name, &device, 4, 1).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(error("prodcut"), "no such policy: prodcut\ndid you mean product?");
        assert_eq!(error("liner@0.5"), "no such policy: liner\ndid you mean linear?");
        assert!(error("zzzzzzzz").starts_with("no such policy: zzzzzzzz\npolicies: product, "));
        assert!(error("").contains("policies: "));
    }

    #[test]
    fn a_weight_has_its_range() {
        let device = device();
        let error = |name: &str| make(name, &device, 4, 1).err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(error("linear@1.5"), "not a weight of linear: 1.5\nlinear takes a weight from 0 to 1");
        assert_eq!(error("jsq@2"), "not a weight of jsq: 2\njsq takes none");
        for bad in ["linear@", "linear@x", "linear@nan", "dynamo@-1", "dynamo@inf", "dynamo_softmax@0", "d2lpm@0"] {
            assert!(error(bad).starts_with("not a weight of "), "{bad}");
        }
        for good in ["linear@0", "linear@1", "dynamo@0", "dynamo@64", "dynamo_softmax@1e-3", "d2lpm@1"] {
            assert_eq!(error(good), "", "{good}");
        }
    }
}
