//! What the model proves of the commit protocol.

use pageferry_model::{HandOver, Rule, Step, check};
use std::fs;
use std::path::Path;

#[test]
fn three_faults_break_no_promise() {
    let found = check(&HandOver::new(3));
    assert!(found.violations.is_empty(), "{:#?}", found.violations);
    assert!(found.states > 10_000, "{} states", found.states);
}

#[test]
fn every_rule_is_needed() {
    for rule in Rule::ALL {
        let mut model = HandOver::new(2);
        model.without.insert(rule);
        let found = check(&model);
        assert!(!found.violations.is_empty(), "{rule:?} could be left out");
    }
}

#[test]
fn steps_name_functions_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for step in Step::ALL {
        let Some((file, function)) = step.code() else {
            continue;
        };
        let source = fs::read_to_string(root.join(file))
            .unwrap_or_else(|error| panic!("{step:?}: {file}: {error}"));
        let defined = ["(", "<"]
            .iter()
            .any(|open| source.contains(&format!("fn {function}{open}")));
        assert!(
            defined,
            "{step:?}: there is no function {function} in {file}"
        );
    }
}
