//! A node that comes and goes for hours, with real sessions and the production policy. The same over a week, without sessions,
//! is in `scheduler/core/tests/repair.rs`.
#![allow(missing_docs, reason = "a test program")]

use std::collections::BTreeMap;

use scheduler_core::policy::repair::REST_TICKS_MAX;

const HOURS: u64 = 1;

/// Orders to put one image on one node, at most: seven while the rest between them doubles from a minute to an hour, then
/// one in each rest.
const ORDERS_MAX: u64 = 7 + HOURS * 3_600 / REST_TICKS_MAX;

fn orders(nodes: usize) -> BTreeMap<String, u64> {
    let mut orders = BTreeMap::new();
    for (image, to) in hearth_sim::flapping(HOURS * 3_600, nodes).unwrap_or_else(|what| panic!("{what}")) {
        *orders.entry(format!("{} to {to}", image.0)).or_default() += 1;
    }
    println!("{nodes} nodes: {orders:?}");
    orders
}

#[test]
fn a_node_that_comes_and_goes_costs_a_bounded_number_of_orders() {
    let alone = orders(2);
    assert!(alone.values().any(|orders| *orders >= 4), "{alone:?}");
    assert!(alone.values().all(|orders| *orders <= ORDERS_MAX), "{alone:?}");
}

#[test]
fn where_another_node_is_free_the_copies_soon_stay_there() {
    let with_another = orders(3);
    assert!(!with_another.is_empty());
    assert!(with_another.values().sum::<u64>() <= 4, "{with_another:?}");
}
