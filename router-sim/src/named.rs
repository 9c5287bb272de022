//! The name that was meant.

use router_core::nearest;

/// A hint for an unknown name: the one most like it, or all where none is.
pub(crate) fn hint(name: &str, known: &[&str]) -> String {
    match nearest(&name.to_lowercase(), known.iter().copied()) {
        Some(one) => format!("did you mean {one}?"),
        None => format!("known are: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::hint;

    #[test]
    fn the_nearest_or_all() {
        let known = ["7b-h20", "13b-a100"];
        assert_eq!(hint("13B_A100", &known), "did you mean 13b-a100?");
        assert_eq!(hint("xyzzy", &known), "known are: 7b-h20, 13b-a100");
        assert_eq!(hint("", &[]), "known are: ");
    }
}
